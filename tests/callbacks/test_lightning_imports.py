"""Lightning's two names, its command line, and its entry points."""

import copy
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from lightning_flatness.measure.batches import split_batch
from tests.callbacks.command_lines import trainer_of, write_config
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards

CALLBACKS = {
    "FlatnessCallback": {
        "layers": ["net.*"],
        "max_samples": 10,
        "measures": ["hessian_trace", "relative_flatness"],
        "on_error": "warn",
        "dtype": "float64",
    },
    "FlatnessStopping": {"monitor": ["flatness/hessian_trace", "flatness/relative_flatness"], "burn_in": 1},
}


def run(how, folder, **environment):
    """Run under ``pytorch_lightning`` in a process of its own, since what is imported counts."""
    script = Path(__file__).with_name("pytorch_lightning_run.py")
    found = subprocess.run(
        [sys.executable, script, how, folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("how", "root"), [("first", "lightning.pytorch"), ("second", "pytorch_lightning")])
def test_both_names_of_lightning(tmp_path, how, root):
    printed = run(how, tmp_path)
    assert f"root: {root}" in printed
    assert "without forward: net.0" in printed
    assert (tmp_path / "best.ckpt").exists()
    seen = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload().Tags()
    assert "flatness/relative_flatness" in seen["scalars"]
    assert {"flatness/history", "spectrum/density", "landscape/contour"} <= set(seen["images"])
    assert "spectrum/trace" in seen["scalars"]


@pytest.mark.slow
def test_command_line_of_pytorch_lightning(tmp_path):
    write_config(tmp_path, CALLBACKS)
    assert "root: pytorch_lightning" in run("cli", tmp_path)


@pytest.mark.slow
def test_command_line(tmp_path):
    callback, stopping = trainer_of(tmp_path, CALLBACKS).callbacks[:2]
    assert isinstance(callback, lf.FlatnessCallback)
    assert isinstance(stopping, lf.FlatnessStopping)
    assert list(callback.report.layers) == ["net.conv1", "net.conv2", "net.fc"]
    assert (callback.report.num_samples, len(callback.history)) == (10, 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 2}, "every"),
        ({"every_n_epochs": "often"}, "every_n_epochs"),
        ({"on_error": "ignore"}, "on_error"),
        ({"data": "test"}, "'val', 'train'"),
        ({"layers": 3}, "layers"),
    ],
    ids=str,
)
def test_wrong_arguments_on_the_command_line(tmp_path, options, named, capsys):
    with pytest.raises((SystemExit, lf.FlatnessError)) as caught:
        trainer_of(tmp_path, {"FlatnessCallback": options}, run=False)
    assert named in capsys.readouterr().err + str(caught.value)


def test_functions_on_the_command_line(tmp_path):
    options = {
        "loss": "torch.nn.functional.cross_entropy",
        "batch_fn": "lightning_flatness.measure.batches.split_batch",
        "model": "copy.copy",
    }
    callback = trainer_of(tmp_path, {"FlatnessCallback": options}, run=False).callbacks[0]
    assert callback.batch_fn is split_batch
    assert callback.model is copy.copy
    assert callback._options["loss"] is cross_entropy


@pytest.mark.parametrize("model", ["net", pytest.param("net.conv1", marks=pytest.mark.slow)])
def test_names_on_the_command_line(tmp_path, model):
    options = {"loss": "mse", "model": model}
    callback = trainer_of(tmp_path, {"FlatnessCallback": options}, run=False).callbacks[0]
    assert (callback.model, callback._options["loss"]) == (model, "mse")


@pytest.mark.parametrize("root", ["lightning.pytorch", "pytorch_lightning"])
def test_entry_points_are_declared(root):
    (found,) = [
        point for point in entry_points(group=f"{root}.callbacks_factory") if point.module.startswith("lightning_f")
    ]
    assert found.load()() == []


def flatness_of(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, lf.FlatnessCallback)]


@guards("callbacks/entry_point.py", 'os.environ.get(VARIABLE, "0") in ("", "0")', "False")
@pytest.mark.parametrize("value", [None, "", "0"])
def test_no_callback_unless_the_environment_asks(tmp_path, monkeypatch, value):
    monkeypatch.delenv("LIGHTNING_FLATNESS", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_FLATNESS", value)
    assert not flatness_of(quiet_trainer(tmp_path))


def test_the_environment_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FLATNESS", "1")
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Classifier(), *loaders())
    (callback,) = flatness_of(trainer)
    assert len(callback.history) == 2


@guards("callbacks.entry_point:_FromEnvironment.setup", body="super().setup(trainer, pl_module, stage)")
@pytest.mark.parametrize("prefix", ["flatness", "other"])
def test_a_callback_of_the_user_comes_before_that_of_the_environment(tmp_path, monkeypatch, prefix):
    monkeypatch.setenv("LIGHTNING_FLATNESS", "1")
    own = lf.FlatnessCallback(prefix=prefix)
    trainer = quiet_trainer(tmp_path, own)
    trainer.fit(Classifier(), *loaders())
    assert flatness_of(trainer) == [own]
    assert len(own.history) == 2
    assert {key.split("/")[0] for key in trainer.callback_metrics} == {prefix, "val_acc"}
