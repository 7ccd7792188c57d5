"""The callback in a real Trainer: what it logs, when, and what it refuses."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset

import lightning_flatness as lf
from lightning_flatness.layers.observer import FlatnessObserver
from tests.callbacks.flatness_runs import MONITOR, Recorder, expected, fit, flatness_callback
from tests.callbacks.lightning_modules import (
    Classifier,
    MixingNet,
    TwoLayerNet,
    WithoutValidation,
    dataset,
    loaders,
    quiet_trainer,
)
from tests.guarding import guards

KEYS = {"hessian_trace", "log10_relative_flatness", "relative_flatness", "weight_norm", "exact"}


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"])
def test_logged_values_are_those_of_measure_flatness(tmp_path, dtype, rtol):
    recorder, (train, val) = Recorder(), loaders(dtype=dtype)
    fit(tmp_path, flatness_callback(), recorder, module=Classifier().to(dtype), data=(train, val), max_epochs=3)
    assert len(recorder.logged) == 3
    for logged, net in zip(recorder.logged, recorder.nets, strict=True):
        report = lf.measure_flatness(net, val)
        assert logged.keys() >= {*(f"flatness/{key}" for key in KEYS), "val_acc"}
        for measure in ("hessian_trace", "relative_flatness"):
            assert logged[f"flatness/{measure}"] == pytest.approx(getattr(report, measure), rel=rtol)
        assert logged["flatness/log10_relative_flatness"] == pytest.approx(np.log10(report.relative_flatness), rel=rtol)
        assert logged["flatness/weight_norm"] == pytest.approx(float(net.conv2.weight.detach().norm()), rel=1e-6)


@pytest.mark.parametrize("data", ["val", "train"])
def test_double_precision_trainer_measures_in_double(tmp_path, data):
    recorder, (train, val) = Recorder(), loaders()
    fit(tmp_path, flatness_callback(data=data), recorder, data=(train, val), precision="64-true")
    batches = [(x.double(), y) for x, y in (val if data == "val" else train)]
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], batches), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"data": "val"}, 0.01), ({"data": "val", "live": False}, 1e-6), ({"data": "train"}, 1e-6)],
    ids=["observed", "val", "train"],
)
def test_passes_of_its_own_are_in_full_precision_under_autocast(tmp_path, options, tolerance):
    recorder, (train, val) = Recorder(), loaders()
    fit(tmp_path, flatness_callback(**options), recorder, data=(train, val), precision="bf16-mixed")
    wanted = expected(recorder.nets[-1], val if options["data"] == "val" else train)
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=tolerance)


def test_fit_validate_and_test_give_identical_numbers(tmp_path):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    trainer = fit(tmp_path, callback, module=module, data=(train, val))
    in_fit = {key: float(value) for key, value in trainer.callback_metrics.items()}
    history = list(callback.history)
    (validated,) = trainer.validate(module, val, verbose=False)
    (tested,) = trainer.test(module, val, verbose=False)
    assert MONITOR in in_fit
    for metrics in (in_fit, validated, tested):
        assert metrics.pop("flatness/seconds") > 0
    assert in_fit == validated == tested
    assert callback.history == history


def test_validate_before_and_after_fit(tmp_path):
    module, (train, val) = Classifier(), loaders()
    trainer = quiet_trainer(tmp_path, flatness_callback(), max_epochs=1)
    for _ in range(2):
        (validated,) = trainer.validate(module, val, verbose=False)
        assert validated[MONITOR] == pytest.approx(expected(module.net, val), rel=1e-6)
        trainer.fit(module, train, val)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_averaged_weights_are_measured(tmp_path, first):
    if not hasattr(lightning_callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    averaging = lightning_callbacks.WeightAveraging(avg_fn=lambda average, new, n: 0.9 * average + 0.1 * new)
    recorder, module, (train, val) = Recorder(), Classifier(lr=0.5), loaders()
    pair = [flatness_callback(), averaging] if first else [averaging, flatness_callback()]
    fit(tmp_path, *pair, recorder, module=module, data=(train, val), max_epochs=3)
    for logged, net in zip(recorder.flatness(), recorder.nets, strict=True):
        assert logged == pytest.approx(expected(net, val), rel=1e-6)


@pytest.mark.parametrize("layers", ["all", ["net.conv2", "net.depth*"]])
def test_several_layers_log_their_own_keys(tmp_path, layers):
    recorder, (train, val) = Recorder(), loaders()
    module = Classifier(TwoLayerNet())
    module.net.conv1.register_parameter("bias", None)
    wanted = ["net.conv2", "net.depthwise"]
    if layers == "all":
        wanted = ["net.conv1", *wanted, "net.fc"]
    callback = flatness_callback(layers=layers)
    fit(tmp_path, callback, recorder, module=module, data=(train, val))
    report = lf.measure_flatness(recorder.nets[-1], val, layers=[name.removeprefix("net.") for name in wanted])
    logged = recorder.logged[-1]
    for name in wanted:
        for measure in ("hessian_trace", "relative_flatness"):
            value = getattr(report.layers[name.removeprefix("net.")], measure)
            assert logged[f"flatness/{name}/{measure}"] == pytest.approx(value, rel=1e-6)
    assert logged[MONITOR] == pytest.approx(report.relative_flatness, rel=1e-6)
    assert logged["flatness/hessian_trace"] == pytest.approx(report.hessian_trace, rel=1e-6)
    norms = [layer.weight_norm for layer in report.layers.values()]
    assert logged["flatness/weight_norm"] == pytest.approx(math.hypot(*norms), rel=1e-6)
    assert list(callback.report.layers) == wanted


def test_flatness_that_is_not_positive_has_no_logarithm(tmp_path):
    module, recorder = Classifier(lr=0.0), Recorder()
    nn.init.zeros_(module.net.conv2.weight)
    fit(tmp_path, flatness_callback(), recorder, module=module)
    assert recorder.flatness() == [0.0, 0.0]
    assert not np.isfinite(recorder.logged[-1].get("flatness/log10_relative_flatness", np.nan))


def test_logarithm_of_an_earlier_validation_is_not_kept(tmp_path):
    class Vanishing(Classifier):
        def on_train_epoch_end(self):
            nn.init.zeros_(self.net.conv2.weight)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    recorder = Recorder()
    fit(tmp_path, flatness_callback(), recorder, module=Vanishing())
    first, second = recorder.logged
    assert first["flatness/log10_relative_flatness"] == pytest.approx(np.log10(first[MONITOR]))
    assert second[MONITOR] == 0.0
    assert not np.isfinite(second.get("flatness/log10_relative_flatness", np.nan))


def test_prefix(tmp_path):
    recorder = Recorder()
    fit(tmp_path, flatness_callback(prefix="sharp"), recorder)
    assert {key.rpartition("/")[0] for key in recorder.logged[-1]} == {"sharp", ""}
    assert recorder.logged[-1].keys() >= {f"sharp/{key}" for key in KEYS}


@guards("callbacks/base.py", 'key = f"{self._name}[prefix={self.prefix}]"', "key = self._name")
def test_two_callbacks_with_different_prefixes(tmp_path):
    def pair():
        return flatness_callback(), flatness_callback(prefix="train_flatness", data="train")

    recorder, (train, val), first = Recorder(), loaders(), pair()
    trainer = fit(tmp_path, *first, recorder, data=(train, val))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)
    on_train = recorder.flatness("train_flatness/relative_flatness")
    assert on_train[-1] == pytest.approx(expected(recorder.nets[-1], train), rel=1e-6)

    trainer.save_checkpoint(tmp_path / "two.ckpt")
    second = pair()
    quiet_trainer(tmp_path, *second, max_epochs=3).fit(Classifier(), train, val, ckpt_path=tmp_path / "two.ckpt")
    for before, after in zip(first, second, strict=True):
        assert after.history[:2] == before.history
        assert [record["epoch"] for record in after.history] == [0, 1, 2]


@guards("callbacks.data.sources:first_samples", returns=None, ids="0-{}-val")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}], ids=str)
@pytest.mark.parametrize("sanity", [0, 2])
def test_bad_model_is_refused_before_the_first_training_step(tmp_path, sanity, options, data):
    if data == "val" and sanity == 0 and "check_val_every_n_epoch" in options:
        pytest.skip("Lightning sets up validation data only when the first validation is due")
    module = Classifier(MixingNet())
    callback = flatness_callback(data=data, strict=True)
    with pytest.raises(lf.NotExactError, match="net.conv2.*channels"):
        fit(tmp_path, callback, module=module, num_sanity_val_steps=sanity, **options)
    assert module.training_steps == 0


@pytest.mark.parametrize("data", ["val", "train"])
def test_model_without_closed_form_is_measured_and_labelled(tmp_path, data):
    callback = flatness_callback(data=data)
    fit(tmp_path, callback, module=Classifier(MixingNet()))
    assert callback.report.layers["net.conv2"].method == "gauss_newton"


# ------------------------------------------------------------------------------------------------ what is not possible


@pytest.mark.parametrize("how", ["no loader", "no validation_step", "limit_val_batches=0", "empty"])
def test_fit_without_validation_warns(tmp_path, how):
    train, val = loaders()
    module = (WithoutValidation if how == "no validation_step" else Classifier)()
    options = {"limit_val_batches": 0} if how.startswith("limit") else {}
    if how == "empty":
        val = DataLoader(Subset(dataset(8), []), batch_size=8)
    data = (train,) if how == "no loader" else (train, val)
    with pytest.warns(
        UserWarning,
        match="measures at validation.*'flatness/hessian_trace' and the other keys will not be.*data='train'",
    ):
        fit(tmp_path, flatness_callback(), module=module, data=data, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss='hinge' is not known"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": ""}, "layers=''"),
        ({"data": "test"}, "'val', 'train', a DataLoader or a list of batches, not 'test'"),
        ({"data": 3}, "'val', 'train', a DataLoader or a list of batches, not 3"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'warn', not 'ignore'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': give 'float32' or 'float64'"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be a whole number, 1 at least.$"),
        ({"every_n_epochs": 1.5}, "every_n_epochs=1.5 must be a whole number"),
        ({"every_n_epochs": True}, "every_n_epochs=True must be a whole number"),
        ({"every_n_epochs": None}, "every_n_epochs=None must be a whole number"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number, 1 at least, or None"),
        ({"max_samples": 10.0}, "max_samples=10.0 must be a whole number"),
        ({"max_samples": -1}, "max_samples=-1"),
        ({"prefix": ""}, "must be a non-empty string"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.FlatnessCallback(**options)


def test_batches_that_can_be_read_once_only_are_refused():
    with pytest.raises(
        lf.FlatnessError, match="data must be 'val', 'train', a DataLoader or a list of batches, not <list_it"
    ):
        lf.FlatnessCallback(data=iter([]))


def test_unknown_layer_is_refused_before_training(tmp_path):
    module = Classifier()
    with pytest.raises(lf.LayerSelectionError, match="Did you mean 'net.conv2'"):
        fit(tmp_path, flatness_callback(layers="net.conv3"), module=module)
    assert module.training_steps == 0


def test_diverged_training_stops_with_an_error(tmp_path):
    class Diverging(Classifier):
        def on_train_epoch_end(self):
            nn.init.constant_(self.net.fc.bias, torch.nan)

    with pytest.raises(lf.BatchError, match="NaN"):
        fit(tmp_path, flatness_callback(), module=Diverging())


# ------------------------------------------------------------------------------------------------- the rest of the run


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("sanity", [0, 2])
def test_summary_is_printed_once(tmp_path, capsys, sanity, data):
    fit(tmp_path, lf.FlatnessCallback(data=data), num_sanity_val_steps=sanity)
    printed = capsys.readouterr().out
    named = {"val": "validation", "train": "training"}[data]
    assert printed.count(f"Flatness on {named} data is measured for these layers, under 'flatness'.") == 1
    assert "net.conv2" in printed


@guards("callbacks/flatness.py", "if self.summary and trainer.is_global_zero:", "if self.summary:")
def test_summary_is_printed_on_rank_zero_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda trainer: False))
    fit(tmp_path, lf.FlatnessCallback())
    assert "measured for" not in capsys.readouterr().out


def test_summary_can_be_silenced(tmp_path, capsys):
    fit(tmp_path, lf.FlatnessCallback(summary=False))
    assert "measured for" not in capsys.readouterr().out


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_short_runs(tmp_path, options, data):
    callback, module = lf.FlatnessCallback(data=data), Classifier()
    fit(tmp_path, callback, module=module, **options)
    assert module.training_steps > 0
    assert callback.report.relative_flatness != 0


def test_compiled_network_keeps_its_name(tmp_path):
    callback, module, (train, val) = flatness_callback(layers=["net.conv2"]), Classifier(), loaders()
    module.net = torch.compile(module.net, backend="eager")
    fit(tmp_path, callback, module=module, data=(train, val), max_epochs=1)
    assert list(callback.report.layers) == ["net.conv2"]
    assert callback.report.relative_flatness == pytest.approx(expected(module.net._orig_mod, val), rel=1e-6)


def test_options_reach_the_measurement(tmp_path):
    options = {
        "layers": "all",
        "label_smoothing": 0.2,
        "class_weight": [1.0, 2.0, 0.5],
        "ignore_index": 2,
        "residual": "hutchinson",
        "num_probes": 5,
        "seed": 3,
    }
    callback, module = lf.FlatnessCallback(summary=False, **options), Classifier()
    trainer = fit(tmp_path, callback, module=module)
    expected = lf.measure_flatness(module, trainer.val_dataloaders, **options)
    assert callback.report.layers.keys() == expected.layers.keys()
    assert callback.report.layers["net.conv1"].method == "gauss_newton+hutchinson"
    for name, layer in expected.layers.items():
        found = callback.report.layers[name]
        assert_close(found.relative_flatness, layer.relative_flatness, rtol=1e-5, atol=0)
        assert_close(found.standard_errors["hessian_trace"], layer.standard_errors["hessian_trace"], rtol=1e-5, atol=0)


@guards("measure/measurement.py", " + 1000 * own_rank(sync)", "")
def test_ranks_have_probes_of_their_own(tmp_path, monkeypatch):
    seeds = []

    class Recorded(FlatnessObserver):
        def __init__(self, *args, **options):
            seeds.append(options["seed"])
            super().__init__(*args, **options)

    monkeypatch.setattr("lightning_flatness.measure.measurement.FlatnessObserver", Recorded)
    for rank in (0, 1):
        monkeypatch.setattr(
            "lightning_flatness.measure.measurement.own_rank", lambda sync, rank=rank: rank if sync else 0
        )
        fit(tmp_path, flatness_callback(seed=7), max_epochs=1)
    assert len(set(seeds)) == 2
    assert seeds[0] == 7
