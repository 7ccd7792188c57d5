"""A run with the callback ends with the same bits as one without it."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_flatness as lf
from tests.callbacks.lightning_modules import dataset
from tests.callbacks.training_runs import RUNS, DrawsOneNumber, assert_identical, end_of_run
from tests.guarding import guards

LONG = ("validation in the epoch", "no sanity check", "clipping")


@guards("callbacks/data/reading.py", ", generators_kept(drawing(batches))", "", ids="data set with a generator-train")
@guards("callbacks/data/reading.py", "random_states_kept(model), gen", "gen", ids="augmentation-train")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.slow) if run in LONG else run for run in RUNS])
def test_training_is_bit_identical(tmp_path, end_without, run, data):
    callback = lf.FlatnessCallback(data=data, figures_every=2 if run == "dropout and shuffling" else None)
    assert_identical(end_of_run(run, tmp_path, callback), end_without(run))
    assert len(callback.history) >= 3


@pytest.mark.parametrize("max_samples", [6, 1000])
@pytest.mark.parametrize("data", ["val", "train"])
def test_training_is_bit_identical_with_a_subset(tmp_path, end_without, data, max_samples):
    callback = lf.FlatnessCallback(data=data, max_samples=max_samples, every_n_epochs=2)
    assert_identical(end_of_run("augmentation", tmp_path, callback), end_without("augmentation"))


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), lambda: np.random.rand(), lambda: random.random()],  # noqa: NPY002
    ids=["torch", "numpy", "python"],
)
def test_one_random_number_would_be_seen(tmp_path, end_without, draw):
    with pytest.raises(AssertionError, match="different: .*net.conv2.weight.*optimizer"):
        assert_identical(end_of_run("augmentation", tmp_path, DrawsOneNumber(draw)), end_without("augmentation"))


class ForwardInTrainingMode(Callback):
    def on_validation_end(self, trainer, pl_module):
        with torch.random.fork_rng():
            pl_module.net.train()(dataset(4).tensors[0])
            pl_module.net.eval()


def test_a_changed_buffer_would_be_seen(tmp_path, end_without):
    with pytest.raises(AssertionError, match=r"different: .*running_mean"):
        assert_identical(end_of_run("plain", tmp_path, ForwardInTrainingMode()), end_without("plain"))
