"""What the spectrum's and the landscape's numbers are is said where they go; checkpoints hold the labels."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_flatness as lf
from lightning_flatness.callbacks.labels import warn_of_inexact
from tests.callbacks.epoch_end_runs import KINDS, kinds
from tests.callbacks.flatness_runs import fit, flatness_callback, warnings_of
from tests.callbacks.lightning_modules import Classifier, MixingNet


@kinds
def test_the_other_callbacks_say_what_was_measured(tmp_path, kind):
    callback = KINDS[kind](every_n_epochs=1, max_samples=10)
    fit(tmp_path, callback, max_epochs=1)
    record = callback.history[-1]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["data"], record["num_samples"], record["loss_name"]) == ("train", 10, "cross_entropy")


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"max_products": 200}, True),
        ({"max_products": 200, "matrix": "gauss_newton"}, False),
        ({"max_products": 2}, False),
    ],
    ids=str,
)
@pytest.mark.slow
def test_eigenvalues_are_labelled(tmp_path, options, exact):
    callback = lf.SpectrumCallback(every_n_epochs=1, top_k=1, num_steps=3, num_probes=1, **options)
    with warnings_of("have not converged") as found:
        trainer = fit(tmp_path, callback)
    assert [record["exact"] for record in callback.history] == [exact] * 2
    assert callback.history[-1]["matrix"] == options.get("matrix", "hessian")
    assert float(trainer.callback_metrics["spectrum/exact"]) == exact
    assert len(found) == (options["max_products"] == 2)  # once a run
    assert callback.history[-1]["trace_stderr"] is None  # of one probe


def test_checkpoints_hold_the_labels(tmp_path):
    fit(tmp_path, flatness_callback(), ModelCheckpoint(tmp_path, filename="part"), module=Classifier(MixingNet()))
    (state,) = [
        state
        for key, state in torch.load(tmp_path / "part.ckpt", weights_only=True)["callbacks"].items()
        if key.startswith("FlatnessCallback")
    ]
    assert [record["exact"] for record in state["history"]] == [False, False]


def test_keys_of_several_loaders_are_0():
    info = SimpleNamespace(name="one", exact=False, method="gauss_newton", reason="of a reason")
    other = SimpleNamespace(**{**vars(info), "name": "other"})
    with warnings_of("not all numbers") as found:
        warn_of_inexact({0: [info], 1: [other]}, frozenset(), "flatness")
    assert "'flatness/exact', 'flatness/exact/dataloader_idx_1' are 0. " in found[0]
