"""What numbers are is said wherever they go: the history, loggers, checkpoints, and one warning of inexact ones."""

import csv
import dataclasses
import json
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.callbacks.labels import numbers_of
from lightning_flatness.measure.flatness import Measurement
from tests.callbacks.flatness_runs import Recorder, fit, flatness_callback, warnings_of
from tests.callbacks.lightning_modules import Classifier, MixingNet, TwoLayerNet, dataset, loaders, quiet_trainer
from tests.guarding import guards

KNOWN = {"loss": 0.5, "accuracy": 0.25, "curvature": 0.75}
ERRORS = {"loss": 0.01, "accuracy": 0.02, "hessian_trace": 0.3, "relative_flatness": 0.4}


class SiluNet(nn.Module):
    """The first convolution is followed by a SiLU and another convolution, so that Gauss-Newton is not all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.second(nn.functional.silu(self.first(x))).relu().mean((2, 3)))


@contextmanager
def interrupted(is_interrupted):
    """Lightning ends the process after Ctrl-C."""
    with pytest.raises((KeyboardInterrupt, SystemExit)) if is_interrupted else nullcontext():
        yield


@pytest.fixture
def reports(monkeypatch):
    """Reports get other fields: a function of the number of the report gives them."""
    made, report = [], Measurement.report

    def changed(fields):
        def altered(self):
            made.append(None)
            return dataclasses.replace(report(self), **fields(len(made) - 1))

        monkeypatch.setattr(Measurement, "report", altered)

    return changed


def logged_rows(folder):
    with (folder / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("flatness/hessian_trace")]


# --------------------------------------------------------------------------------------------------------- the history


@pytest.mark.parametrize("net", [MixingNet, SiluNet, TwoLayerNet])
def test_history_is_plain_and_says_what_was_measured(tmp_path, net):
    layers = "net.first" if net is SiluNet else "last"
    callback, module = flatness_callback(layers=layers), Classifier(net())
    fit(tmp_path, callback, module=module)
    ((name, layer),) = callback.report.layers.items()
    for record in callback.history:
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert record["layers"] == [name]
        assert record["exact"] is layer.exact is (net is TwoLayerNet)
        assert (record["method"], record["precision"]) == (layer.method, "float32")
        assert (record["data"], record["num_samples"], record["loss_name"]) == ("val", 22, "cross_entropy")


def test_the_numbers_are_those_of_the_samples(tmp_path):
    callback, recorder, (train, val) = flatness_callback(), Recorder(), loaders()
    fit(tmp_path, callback, recorder, data=(train, val))
    record, logged, net = callback.history[-1], recorder.logged[-1], recorder.nets[-1].eval()
    report = lf.measure_flatness(net, val)
    x, y = val.dataset[:]
    with torch.no_grad():
        logits = net(x)
    assert record["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert record["top1"] == pytest.approx(float((logits.argmax(1) == y).float().mean()), rel=1e-6)
    probabilities = logits.softmax(1)
    assert record["curvature"] == pytest.approx(float((1 - probabilities.square().sum(1)).mean()), rel=1e-5)
    for key in ("normalized_relative_flatness", "loss", "curvature"):
        assert record[key] == pytest.approx(getattr(report, key), rel=1e-5)
        assert logged[f"flatness/{key}"] == pytest.approx(record[key], rel=1e-6)
    for key in ("hessian_trace", "relative_flatness"):
        assert record[f"{key}_error"] == pytest.approx(report.sampling_errors[key], rel=1e-4)
        assert logged[f"flatness/{key}_error"] == pytest.approx(record[f"{key}_error"], rel=1e-6)
    assert record["top1_error"] == pytest.approx(report.sampling_errors["accuracy"], rel=1e-4)
    assert record["accuracy"] == pytest.approx(record["top1"], abs=1e-6)  # the module's own, of the same samples


def test_numbers_of_the_samples_go_into_history_and_logs(tmp_path, reports):
    reports(lambda index: {**KNOWN, "sampling_errors": ERRORS})
    callback, recorder = flatness_callback(), Recorder()
    fit(tmp_path, callback, recorder)
    record, logged = callback.history[-1], recorder.logged[-1]
    assert (record["loss"], record["top1"], record["curvature"]) == (0.5, 0.25, 0.75)
    assert (record["loss_error"], record["top1_error"], record["curvature_error"]) == (0.01, 0.02, None)
    assert (record["hessian_trace_error"], record["relative_flatness_error"]) == (0.3, 0.4)
    assert record["accuracy"] == pytest.approx(logged["val_acc"])  # the module's own
    for key in ("loss", "top1", "curvature", "hessian_trace_error", "relative_flatness_error"):
        assert logged[f"flatness/{key}"] == pytest.approx(record[key])
    assert not {"flatness/accuracy", "flatness/num_samples", "flatness/loss_error"} & logged.keys()


def test_the_measured_share_of_correct_classes_is_not_taken_for_the_accuracy(tmp_path, reports):
    class WithoutAccuracy(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    reports(lambda index: KNOWN)
    callback = flatness_callback()
    fit(tmp_path, callback, module=WithoutAccuracy())
    assert [record["accuracy"] for record in callback.history] == [None, None]


def test_several_layers_have_labels_of_their_own(tmp_path):
    callback, recorder = flatness_callback(layers=["net.first", "net.second"]), Recorder()
    fit(tmp_path, callback, recorder, module=Classifier(SiluNet()))
    record, logged = callback.history[-1], recorder.logged[-1]
    assert record["layers"] == ["net.first", "net.second"]
    assert record["method"] == "gauss_newton, closed_form"
    assert (record["exact"], record["net.first/exact"], record["net.second/exact"]) == (False, False, True)
    assert (record["net.first/method"], record["net.second/method"]) == ("gauss_newton", "closed_form")
    keys = ("exact", "net.first/exact", "net.second/exact")
    assert [logged[f"flatness/{key}"] for key in keys] == [0.0, 0.0, 1.0]


def test_several_loaders_have_labels_of_their_own(tmp_path):
    train, val = loaders()
    callback, recorder = flatness_callback(), Recorder()
    fit(tmp_path, callback, recorder, data=(train, [val, DataLoader(dataset(7, seed=3), 4)]))
    record = callback.history[-1]
    assert (record["data"], record["data/dataloader_idx_1"]) == ("val", "val, loader 1")
    assert (record["num_samples"], record["num_samples/dataloader_idx_1"]) == (22, 7)
    assert record["exact/dataloader_idx_1"] is True
    assert recorder.logged[-1]["flatness/exact/dataloader_idx_1"] == 1.0
    assert [report.data for report in callback.reports.values()] == ["val", "val, loader 1"]


def test_reports_name_their_data(tmp_path):
    train, val = loaders()
    for data, name in [("val", "val"), ("train", "train"), (val, "given")]:
        callback = flatness_callback(data=data)
        trainer = fit(tmp_path, callback, data=(train, val), max_epochs=1)
        assert callback.report.data == callback.history[-1]["data"] == name
        if data == "train":
            continue  # measured during fit only
        trainer.validate(Classifier(), val, verbose=False)
        assert callback.report.data == name
        trainer.test(Classifier(), val, verbose=False)
        assert callback.report.data == {"val": "test"}.get(name, name)


def test_the_trace_alone(tmp_path):
    callback, recorder = flatness_callback(measures=["hessian_trace"]), Recorder()
    fit(tmp_path, callback, recorder)
    assert callback.history[-1]["exact"] is True
    assert recorder.logged[-1]["flatness/exact"] == 1.0
    assert not [key for key in recorder.logged[-1] if "relative_flatness" in key]


# ------------------------------------------------------------------------------------------------- which keys there are


def test_what_is_never_known_is_not_logged(tmp_path, reports):
    reports(lambda index: dict.fromkeys(KNOWN, math.nan))
    callback = flatness_callback()
    fit(tmp_path, callback, logger=CSVLogger(tmp_path, name=""))
    assert all(record["loss"] is record["top1"] is record["curvature"] is None for record in callback.history)
    assert not {"flatness/loss", "flatness/top1", "flatness/curvature"} & logged_rows(tmp_path)[0].keys()


@guards("callbacks/labels.py", "for one in [*earlier, record]", "for one in [record]")
def test_keys_stay_when_a_number_is_not_known_once(tmp_path, reports):
    reports(lambda index: {**KNOWN, "loss": math.nan if index == 1 else 0.5})
    callback, recorder = flatness_callback(), Recorder()
    fit(tmp_path, callback, recorder, max_epochs=3)
    assert [record["loss"] for record in callback.history] == [0.5, None, 0.5]
    assert {frozenset(logged) for logged in recorder.logged} == {frozenset(recorder.logged[0])}
    assert math.isnan(recorder.logged[1]["flatness/loss"])
    assert len({frozenset(record) for record in callback.history}) == 1


def test_keys_stay_in_a_resumed_run(tmp_path, reports):
    reports(lambda index: KNOWN if index < 2 else {})
    fit(tmp_path, flatness_callback(), ModelCheckpoint(tmp_path, filename="part"))
    reports(lambda index: dict.fromkeys(KNOWN, math.nan))
    recorder = Recorder()
    trainer = quiet_trainer(tmp_path, flatness_callback(), recorder, max_epochs=3)
    trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "part.ckpt")
    assert math.isnan(recorder.logged[-1]["flatness/loss"])


def test_labels_are_logged_again_after_a_resume(tmp_path):
    net = {"module": Classifier(MixingNet())}
    fit(tmp_path, flatness_callback(every_n_epochs=5), ModelCheckpoint(tmp_path, filename="part"), **net)
    recorder = Recorder()
    trainer = quiet_trainer(tmp_path, flatness_callback(every_n_epochs=5), recorder, max_epochs=3)
    trainer.fit(Classifier(MixingNet()), *loaders(), ckpt_path=tmp_path / "part.ckpt")
    assert recorder.logged[-1]["flatness/exact"] == 0.0
    assert "flatness/relative_flatness" in recorder.logged[-1]


def test_a_record_without_labels_is_logged_as_it_is():
    old = {"epoch": 1, "step": 3, "accuracy": 0.5, "hessian_trace": 2.0, "weight_norm": 1.0}
    assert numbers_of(old, [old]) == {"hessian_trace": 2.0, "weight_norm": 1.0}


# --------------------------------------------------------------------------------------------------------- the warning


@guards(
    "callbacks/flatness.py",
    "self._told_inexact = labels.warn_of_inexact({0: self._certified[0].values()}, self._told_inexact, self.prefix)",
    "pass",
    ids="False-before training",
)
@guards("callbacks/labels.py", "& (told | new)", "& set()", ids="False-while training")
@pytest.mark.parametrize("when", ["before training", "while training"])
@pytest.mark.parametrize("summary", [False, True])
def test_one_warning_names_the_layer_and_the_reason(tmp_path, summary, when):
    class StopsAtOnce(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    callback = lf.FlatnessCallback(layers=["net.first", "net.second"], summary=summary)
    module = (StopsAtOnce if when == "before training" else Classifier)(SiluNet())
    with warnings_of("net.first") as found, interrupted(when == "before training"):
        fit(tmp_path, callback, module=module, max_epochs=3)
    (message,) = found
    assert "net.second" not in message
    assert "the Gauss-Newton part of the Hessian, since" in message
    assert callback._certified[0]["net.first"].reason in message
    assert "'flatness/exact' is 0" in message


class CurvedOnOther(Classifier):
    """On the second loader its logits are curved."""

    def forward(self, x, loader=0):
        logits = self.net(x)
        return logits.sinh() if loader else logits

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_acc", (self(batch[0], dataloader_idx).argmax(1) == batch[1]).double().mean())


def test_the_warning_names_the_key_of_another_loader(tmp_path):
    train, val = loaders()
    with warnings_of("net.conv2") as found:
        trainer = fit(tmp_path, flatness_callback(), module=CurvedOnOther(), data=(train, [val, val]))
    (message,) = found
    assert "'flatness/exact/dataloader_idx_1' is 0" in message
    assert trainer.callback_metrics["flatness/exact"] == 1
    assert trainer.callback_metrics["flatness/exact/dataloader_idx_1"] == 0


def test_exact_numbers_come_without_a_warning(tmp_path):
    with warnings_of("exact") as found:
        fit(tmp_path, flatness_callback())
    assert not found


def test_the_next_fit_warns_again(tmp_path):
    callback, module = flatness_callback(layers="net.first"), Classifier(SiluNet())
    for _ in range(2):
        with warnings_of("net.first") as found:
            fit(tmp_path, callback, module=module)
        assert len(found) == 1


def test_a_layer_that_is_no_longer_exact_is_named_later(tmp_path, monkeypatch):
    made, report = [], Measurement.report

    def altered(self):
        found = report(self)
        made.append(found)
        if len(made) < 2:
            return found
        layers = {
            name: dataclasses.replace(
                layer, info=dataclasses.replace(layer.info, exact=False, reason="it is not", method="gauss_newton")
            )
            for name, layer in found.layers.items()
        }
        return dataclasses.replace(found, layers=layers)

    monkeypatch.setattr(Measurement, "report", altered)
    callback = flatness_callback()
    with warnings_of("since it is not") as found:
        fit(tmp_path, callback, max_epochs=4)
    assert len(found) == 1
    assert [record["exact"] for record in callback.history] == [True, False, False, False]


@pytest.mark.parametrize("run", ["validate", "test"])
def test_runs_without_training_warn_too(tmp_path, run):
    trainer = quiet_trainer(tmp_path, flatness_callback(layers="net.first"))
    with warnings_of("net.first") as found:
        getattr(trainer, run)(Classifier(SiluNet()), loaders()[1], verbose=False)
    assert len(found) == 1


def test_a_callback_that_the_environment_asks_for_warns(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FLATNESS", "1")
    with warnings_of("net.conv2") as found:
        quiet_trainer(tmp_path).fit(Classifier(MixingNet()), *loaders())
    assert len(found) == 1


def test_many_layers_are_counted(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 4), *[nn.Sequential(nn.GELU(), nn.Linear(4, 4)) for _ in range(11)]
            )
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.body(x))

    with warnings_of("since") as found:
        fit(tmp_path, flatness_callback(layers="all"), module=Classifier(Deep()), max_epochs=1)
    (message,) = [one for one in found if "not all numbers" in one]
    assert "and 3 more: the Gauss-Newton part" in message
