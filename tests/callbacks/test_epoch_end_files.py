"""What callbacks that measure at the end of epochs write, keep and refuse."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_flatness as lf
from tests.callbacks.command_lines import trainer_of
from tests.callbacks.epoch_end_runs import KINDS, epochs, fit, kinds
from tests.callbacks.lightning_modules import Classifier, WithoutForward, dataset, loaders, quiet_trainer
from tests.guarding import guards

# --------------------------------------------------------------------------------------------------- loggers and files


@kinds
def test_files_load_without_pickle(tmp_path, kind):
    fit(tmp_path, KINDS[kind](every_n_epochs=2))
    folder = tmp_path / "lightning_logs" / "version_0" / kind
    names = sorted(path.name for path in folder.iterdir())
    suffixes = [".npz"] if kind == "spectrum" else ["-kept.npz", "-recomputed.npz"]
    assert names == [f"epoch={epoch}-step={4 * epoch + 4}{suffix}" for epoch in (0, 2) for suffix in suffixes]
    record = lf.SpectrumResult if kind == "spectrum" else lf.LandscapeResult
    assert record.load(folder / names[-1]).num_samples == 32


@kinds
def test_files_go_where_they_are_wanted(tmp_path, kind):
    fit(tmp_path, KINDS[kind](folder=str(tmp_path / "here" / "there")))
    assert list((tmp_path / "here" / "there").glob("*.npz"))


@kinds
def test_files_that_cannot_be_written(tmp_path, kind):
    (tmp_path / "file").touch()
    callback = KINDS[kind](folder=str(tmp_path / "file"), on_error="warn")
    with pytest.warns(UserWarning, match="Callback.on_error='warn'. could not write the files of the end of the fit: "):
        fit(tmp_path, callback)
    assert epochs(callback) == [2]


@kinds
@pytest.mark.slow
def test_figures(tmp_path, kind):
    fit(tmp_path, KINDS[kind](every_n_epochs=2), logger=TensorBoardLogger(tmp_path))
    seen = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), {"images": 0}).Reload()
    tags = {
        "spectrum": ["spectrum/density", "spectrum/eigenvalues"],
        "landscape": [
            "landscape/batch_norm",
            *(f"landscape/{name}/{which}" for name in ("contour", "surface") for which in ("kept", "recomputed")),
        ],
    }[kind]
    assert sorted(seen.Tags()["images"]) == tags
    assert [image.step for image in seen.Images(tags[0])] == [3, 11]
    assert [image.step for image in seen.Images(tags[-1])] == ([11] if kind == "spectrum" else [3, 11])
    assert (tmp_path / "lightning_logs" / "version_0" / kind).exists()


@kinds
def test_no_figures(tmp_path, kind):
    fit(tmp_path, KINDS[kind](figures=False), logger=TensorBoardLogger(tmp_path))
    assert not EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload().Tags()["images"]


@kinds
def test_other_loggers(tmp_path, kind):
    fit(tmp_path, KINDS[kind](), logger=CSVLogger(tmp_path))
    assert (tmp_path / "lightning_logs" / "version_0" / kind).exists()


@guards("callbacks.logged:logging_muted", body="yield")
@kinds
def test_what_a_forward_logs_is_not_logged(tmp_path, kind):
    class Logs(Classifier):
        def forward(self, x):
            self.log("from forward", 1.0)
            return self.net(x)

    trainer = fit(tmp_path, KINDS[kind](every_n_epochs=1), module=Logs())
    assert "from forward" not in trainer.callback_metrics


# --------------------------------------------------------------------------------------------------------------- state


def without_seconds(callback):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in callback.history]


@guards("callbacks/base.py", "not self._is_restored and not (trainer", "not (trainer")
@kinds
@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_history(tmp_path, kind):
    whole = KINDS[kind](every_n_epochs=1)
    fit(tmp_path, whole, max_epochs=4)
    first = KINDS[kind](every_n_epochs=1)
    fit(tmp_path, first, ModelCheckpoint(tmp_path, filename="last"), max_epochs=2)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    second = KINDS[kind](every_n_epochs=1)
    trainer = quiet_trainer(tmp_path, second, max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert epochs(second) == [0, 1, 2, 3]
    assert second.history[:2] == first.history[:2]
    assert without_seconds(second)[:2] == without_seconds(whole)[:2]


@kinds
def test_a_second_fit_begins_anew(tmp_path, kind):
    callback = KINDS[kind]()
    for _ in range(2):
        fit(tmp_path, callback, max_epochs=2)
    assert epochs(callback) == [1]


@kinds
def test_two_of_a_kind(tmp_path, kind):
    pair = [KINDS[kind](prefix=prefix) for prefix in ("one", "two")]
    fit(tmp_path, *pair, ModelCheckpoint(tmp_path))
    assert without_seconds(pair[0]) == without_seconds(pair[1])
    assert {path.name for path in (tmp_path / "lightning_logs" / "version_0").iterdir()} == {"one", "two"}


@kinds
def test_copies(tmp_path, kind):
    callback = KINDS[kind]()
    fit(tmp_path, callback)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.history == callback.history


# ------------------------------------------------------------------------------------------------------------ refusals


@kinds
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": "test"}, "data must be 'val', 'train'"),
        ({"data": 3}, "data must be"),
        ({"data": iter([1])}, "data must be"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_epochs": 1.5}, "every_n_epochs=1.5"),
        ({"prefix": ""}, "prefix=''"),
        ({"on_error": "ignore"}, "on_error"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"loss": "mse", "label_smoothing": 0.1}, "label_smoothing"),
        ({"seed": -1}, "seed"),
        ({"dtype": "float16"}, "dtype"),
    ],
    ids=lambda value: next(iter(value), "defaults") if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_wrong_options_are_refused_at_once(kind, options, named):
    with pytest.raises(lf.FlatnessError, match=named):
        KINDS[kind](**options)


def no_samples(batch):
    return 3


@kinds
@pytest.mark.parametrize(
    ("options", "module", "named"),
    [
        ({}, WithoutForward, "has no forward"),
        ({"model": "network"}, Classifier, "no such module"),
        ({"batch_fn": no_samples}, Classifier, "batch_fn=... returned a int"),
        ({"loss": "binary_cross_entropy"}, Classifier, "targets"),
        ({"data": [torch.zeros(2, 1, 8, 8)]}, Classifier, "targets"),
        ({"data": [dataset(4)[:]], "max_samples": 2}, Classifier, "max_samples=... needs"),
    ],
    ids=lambda value: next(iter(value), "defaults") if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_what_cannot_be_measured_is_refused_before_the_first_epoch(tmp_path, kind, options, module, named):
    module = module()
    with pytest.raises(lf.FlatnessError, match=named):
        fit(tmp_path, KINDS[kind](**options), module=module)
    assert module.training_steps == 0
    module.training_steps = 0
    with pytest.warns(UserWarning, match=f"has no {kind} for the start of training; the measurement failed: .*{named}"):
        fit(tmp_path, KINDS[kind](**options, on_error="warn"), module=module)
    assert module.training_steps == 12


# -------------------------------------------------------------------------------------------------------- command line


OPTIONS = {
    "spectrum": {"params": ["net.conv1"], "top_k": 1, "num_steps": 3, "num_probes": 1, "loss": "cross_entropy"},
    "landscape": {"axes": ["hessian"], "span": [-0.5, 1.0], "steps": 3, "frozen": ["*.bias"], "normalize": "filter"},
}


@pytest.mark.slow
@kinds
def test_command_line(tmp_path, kind):
    options = {"every_n_epochs": 1, "dtype": "float64", **OPTIONS[kind]}
    trainer = trainer_of(tmp_path, {f"{kind.title()}Callback": options})
    assert epochs(trainer.callbacks[0]) == [0, 1]
