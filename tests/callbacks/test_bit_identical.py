"""A run with the callback ends with the same bits as one without it."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer
from tests.callbacks.training_runs import (
    HAS_WEIGHT_AVERAGING,
    WithFrozenNorm,
    WithoutDropout,
    augmented,
    averaged_weights,
    differences,
    end_of_training,
    seed_everything,
    unshuffled,
    with_one_generator,
    with_own_generators,
)

# name: module, loaders, options of the Trainer
RUNS = {
    "plain": (WithoutDropout, unshuffled, {}),
    "dropout and shuffling": (Classifier, loaders, {}),
    "augmentation": (Classifier, augmented, {}),
    "frozen BatchNorm": (WithFrozenNorm, loaders, {}),
    "accumulation": (Classifier, loaders, {"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "validation in the epoch": (Classifier, augmented, {"val_check_interval": 1}),
    "no sanity check": (Classifier, augmented, {"num_sanity_val_steps": 0}),
    "clipping": (Classifier, loaders, {"gradient_clip_val": 0.1}),
    "workers": (Classifier, lambda: augmented(workers_in_train=1), {"val_check_interval": 2}),
    "workers in validation": (Classifier, lambda: augmented(workers_in_val=1), {}),
    "workers, no sanity check": (Classifier, lambda: augmented(workers_in_val=1), {"num_sanity_val_steps": 0}),
    "one generator": (Classifier, with_one_generator, {}),
    "one generator, no sanity check": (Classifier, with_one_generator, {"num_sanity_val_steps": 0}),
    "data set with a generator": (Classifier, with_own_generators, {}),
    "averaged weights": (Classifier, loaders, {}),
}
WITH_FIGURES = ("dropout and shuffling", "validation in the epoch")


def others(run):
    if run != "averaged weights":
        return []
    if not HAS_WEIGHT_AVERAGING:
        pytest.skip("this Lightning has no WeightAveraging")
    return [averaged_weights()]


def end_of(run, folder, *callbacks):
    """Everything that training leaves behind, by name."""
    seed_everything()
    module_class, data, options = RUNS[run]
    module = module_class()
    logger = TensorBoardLogger(folder) if run in WITH_FIGURES else False
    trainer = quiet_trainer(folder, *callbacks, *others(run), max_epochs=3, logger=logger, **options)
    trainer.fit(module, *data())
    return end_of_training(trainer, module)


def assert_identical(one, other):
    different = differences(one, other)
    assert not different, f"different: {different}"


@pytest.fixture(scope="module")
def end_without(tmp_path_factory):
    """The end of a run without the callback, run once."""
    ends = {}

    def end(run):
        if run not in ends:
            ends[run] = end_of(run, tmp_path_factory.mktemp("without"))
        return ends[run]

    return end


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("run", RUNS)
def test_training_is_bit_identical(tmp_path, end_without, run, data):
    callback = lf.FlatnessCallback(data=data)
    assert_identical(end_of(run, tmp_path, callback), end_without(run))
    assert len(callback.history) >= 3


@pytest.mark.parametrize("max_samples", [6, 1000])
@pytest.mark.parametrize("data", ["val", "train"])
def test_training_is_bit_identical_with_a_subset(tmp_path, end_without, data, max_samples):
    callback = lf.FlatnessCallback(data=data, max_samples=max_samples, every_n_epochs=2)
    assert_identical(end_of("augmentation", tmp_path, callback), end_without("augmentation"))


class DrawsOneNumber(Callback):
    def __init__(self, draw):
        self.draw = draw

    def on_validation_end(self, trainer, pl_module):
        self.draw()


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), lambda: np.random.rand(), lambda: random.random()],  # noqa: NPY002
    ids=["torch", "numpy", "python"],
)
def test_one_random_number_would_be_seen(tmp_path, end_without, draw):
    with pytest.raises(AssertionError, match="different: .*net.conv2.weight.*optimizer"):
        assert_identical(end_of("augmentation", tmp_path, DrawsOneNumber(draw)), end_without("augmentation"))


class ForwardInTrainingMode(Callback):
    def on_validation_end(self, trainer, pl_module):
        with torch.random.fork_rng():
            pl_module.net.train()(dataset(4).tensors[0])
            pl_module.net.eval()


def test_a_changed_buffer_would_be_seen(tmp_path, end_without):
    with pytest.raises(AssertionError, match=r"different: .*running_mean"):
        assert_identical(end_of("plain", tmp_path, ForwardInTrainingMode()), end_without("plain"))
