"""What the loggers get to see: scalars everywhere, charts and figures in TensorBoard."""

import contextlib
import csv
import re
import sys
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_flatness as lf
from lightning_flatness.callbacks import flatness_figures
from tests.callbacks.lightning_modules import Classifier, Interrupted, TwoLayerNet, loaders, quiet_trainer
from tests.callbacks.tensorboard_events import charts, events
from tests.guarding import guards

KEYS = [f"flatness/{key}" for key in ("hessian_trace", "log10_relative_flatness", "relative_flatness", "weight_norm")]
FIGURES = ["flatness/block_traces/net.conv2", "flatness/history"]


def fit(folder, *callbacks, module=None, logger=None, **options):
    logger = TensorBoardLogger(folder, name="") if logger is None else logger
    trainer = quiet_trainer(folder, *callbacks, logger=logger, **options)
    trainer.fit(Classifier() if module is None else module, *loaders())
    return trainer


def matches(pattern, accumulator):
    return [tag for tag in accumulator.Tags()["scalars"] if re.match(pattern, tag)]


def test_scalars_are_logged_at_the_steps_of_the_accuracy(tmp_path):
    callback = lf.FlatnessCallback(summary=False)
    fit(tmp_path, callback, max_epochs=3)
    seen = events(tmp_path)
    steps = [event.step for event in seen.Scalars("val_acc")]
    assert len(steps) == 3
    for key in KEYS:
        assert [event.step for event in seen.Scalars(key)] == steps
    values = [event.value for event in seen.Scalars("flatness/relative_flatness")]
    assert values == pytest.approx([record["relative_flatness"] for record in callback.history], rel=1e-6)


def test_scalars_of_several_layers(tmp_path):
    callback = lf.FlatnessCallback(["*conv2", "*depthwise"], summary=False)
    fit(tmp_path, callback, module=Classifier(TwoLayerNet()))
    tags = events(tmp_path).Tags()
    for layer in ("net.conv2", "net.depthwise"):
        assert {f"flatness/{layer}/{key}" for key in ("hessian_trace", "relative_flatness")} <= set(tags["scalars"])
        assert f"flatness/block_traces/{layer}" in tags["images"]


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"num_sanity_val_steps": 0}], ids=str)
def test_accuracy_and_flatness_have_a_chart_each(tmp_path, options):
    fit(tmp_path, lf.FlatnessCallback(summary=False), max_epochs=3, **options)
    seen = events(tmp_path)
    shown = {title: [matches(pattern, seen) for pattern in patterns] for title, patterns in charts(seen).items()}
    keys = ["val_acc", "flatness/log10_relative_flatness"]
    assert list(shown) == keys
    assert list(shown.values()) == [[[key]] for key in keys]


def test_chart_of_an_accuracy_that_is_logged_in_steps_too(tmp_path):
    class Stepwise(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            self.log("val_acc", 0.5, on_step=True, on_epoch=True)

    fit(tmp_path, lf.FlatnessCallback(summary=False), module=Stepwise())
    seen = events(tmp_path)
    assert len(charts(seen)) == 2
    assert all(matches(pattern, seen) for patterns in charts(seen).values() for pattern in patterns)


def test_chart_without_an_accuracy(tmp_path):
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    fit(tmp_path, lf.FlatnessCallback(summary=False), module=Silent())
    assert charts(events(tmp_path)) == {"flatness/log10_relative_flatness": ["^flatness/log10_relative_flatness$"]}


@guards("callbacks/charts.py", "if any(callback.run_outputs.has_charts for callback in callbacks):", "if False:")
@pytest.mark.slow
def test_two_callbacks_are_both_in_the_charts(tmp_path):
    # TensorBoard serves one layout of a run.
    pair = [lf.FlatnessCallback(summary=False, prefix=prefix) for prefix in ("one", "two")]
    fit(tmp_path, *pair)
    seen = events(tmp_path)
    assert {f"{prefix}/history" for prefix in ("one", "two")} <= set(seen.Tags()["images"])
    shown = {tag for patterns in charts(seen).values() for pattern in patterns for tag in matches(pattern, seen)}
    assert shown == {"val_acc", "one/log10_relative_flatness", "two/log10_relative_flatness"}


@pytest.mark.parametrize("data", ["val", "train"])
def test_figures_are_drawn_at_the_end(tmp_path, data):
    fit(tmp_path, lf.FlatnessCallback(data=data, summary=False))
    seen = events(tmp_path)
    assert sorted(seen.Tags()["images"]) == FIGURES
    for tag in FIGURES:
        (image,) = seen.Images(tag)
        assert image.width > 400
        assert image.height > 300


def test_figures_can_be_left_out(tmp_path):
    fit(tmp_path, lf.FlatnessCallback(summary=False, figures=False))
    assert events(tmp_path).Tags()["images"] == []


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.slow
def test_figures_of_an_interrupted_run(tmp_path, data):
    callback = lf.FlatnessCallback(data=data, summary=False)
    with contextlib.suppress(SystemExit):  # of recent Lightning; older ones return
        fit(tmp_path, callback, module=Interrupted(), max_epochs=5)
    assert len(callback.history) == 2
    assert sorted(events(tmp_path).Tags()["images"]) == FIGURES


@pytest.mark.usefixtures("sigint_kept")
def test_interruption_before_the_first_measurement(tmp_path):
    with contextlib.suppress(SystemExit):
        fit(tmp_path, lf.FlatnessCallback(summary=False), module=Interrupted(epoch=0))
    assert events(tmp_path).Tags()["images"] == []


def test_csv_has_the_scalars(tmp_path):
    callback = lf.FlatnessCallback(summary=False)
    fit(tmp_path, callback, logger=CSVLogger(tmp_path, name=""))
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_acc"]]
    assert len(rows) == 2
    for row, record in zip(rows, callback.history, strict=True):
        assert all(row[key] for key in KEYS)
        assert float(row["flatness/relative_flatness"]) == pytest.approx(record["relative_flatness"], rel=1e-6)


def test_without_a_logger(tmp_path):
    callback = lf.FlatnessCallback(summary=False)
    fit(tmp_path, callback, logger=False)
    assert len(callback.history) == 2


def test_several_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path / "csv", name=""), TensorBoardLogger(tmp_path, name="")]
    fit(tmp_path, lf.FlatnessCallback(summary=False), logger=loggers)
    assert sorted(events(tmp_path).Tags()["images"]) == FIGURES


def test_without_matplotlib_there_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"draws no figures.*pip install matplotlib"):
        fit(tmp_path, lf.FlatnessCallback(summary=False))
    seen = events(tmp_path)
    assert seen.Tags()["images"] == []
    assert set(KEYS) < set(seen.Tags()["scalars"])
    assert len(charts(seen)) == 2


def test_without_matplotlib_there_is_no_warning_where_no_figures_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        fit(tmp_path, lf.FlatnessCallback(summary=False, figures=False), logger=CSVLogger(tmp_path))


def test_flatness_of_zero_is_drawn(tmp_path):
    module = Classifier(lr=0.0)
    torch.nn.init.zeros_(module.net.conv2.weight)
    fit(tmp_path, lf.FlatnessCallback(summary=False), module=module)
    assert sorted(events(tmp_path).Tags()["images"]) == FIGURES


@pytest.mark.slow
def test_several_layers_are_drawn_side_by_side(tmp_path):
    callback = lf.FlatnessCallback(layers="all", summary=False)
    fit(tmp_path, callback)
    images = events(tmp_path).Tags()["images"]
    assert {"flatness/layers", "flatness/layer_history"} <= set(images)
    assert "flatness/block_traces/net.conv2" in images
    assert all(record["net.conv1/relative_flatness"] > 0 for record in callback.history)


def test_diagonals_alone_are_logged_and_drawn(tmp_path):
    callback = lf.FlatnessCallback(layers="all", measures=["hessian_trace"], summary=False)
    fit(tmp_path, callback)
    seen = events(tmp_path).Tags()
    assert {"flatness/hessian_trace", "flatness/log10_hessian_trace", "flatness/net.conv1/hessian_trace"} <= set(
        seen["scalars"]
    )
    assert not [tag for tag in seen["scalars"] if "relative_flatness" in tag]
    assert sorted(seen["images"]) == ["flatness/history", "flatness/layer_history", "flatness/layers"]
    assert "relative_flatness" not in callback.history[0]


def test_the_stop_and_the_burn_in_are_in_the_figure(tmp_path, monkeypatch):
    drawn = []
    plot = flatness_figures.plot_history
    monkeypatch.setattr(
        flatness_figures, "plot_history", lambda *given, **options: drawn.append(options) or plot(*given, **options)
    )
    stopping = lf.FlatnessStopping(burn_in=1, patience=1, min_delta=0.99, accuracy_min_delta=1.0)
    fit(tmp_path, lf.FlatnessCallback(summary=False), stopping, max_epochs=9)
    (options,) = drawn
    assert 0 < stopping.stopped_epoch < 8
    assert (options["burn_in"], options["stopped"]) == (1, stopping.stopped_epoch)
    assert options["accuracy_label"] == "val_acc"
    assert options["report"].num_samples


def test_the_stop_of_an_earlier_run_is_not_in_the_figure(tmp_path, monkeypatch):
    drawn, plot = [], flatness_figures.plot_history
    monkeypatch.setattr(
        flatness_figures, "plot_history", lambda *given, **options: drawn.append(options) or plot(*given, **options)
    )

    def callbacks():
        return lf.FlatnessCallback(summary=False), EarlyStopping("val_acc", mode="max", stopping_threshold=-1.0)

    trainer = fit(tmp_path, *callbacks(), min_epochs=2, max_epochs=9)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second = callbacks()
    second[1].stopping_threshold = None
    trainer = quiet_trainer(tmp_path, *second, figures="files", max_epochs=4)
    trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "stopped.ckpt")
    assert [options["stopped"] for options in drawn] == [1, None]
