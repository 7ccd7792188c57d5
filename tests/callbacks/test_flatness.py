"""The callback in a real Trainer: what it logs, when, and what it refuses."""

import copy
import gc
import math
import pickle
import random
import warnings
import weakref

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
)

import lightning_flatness as lf
from lightning_flatness.callbacks.data.stratified import choose, labels_of
from lightning_flatness.callbacks.data.subset import FixedSubset, training_subset
from lightning_flatness.layers.observer import FlatnessObserver
from tests.callbacks.lightning_modules import (
    Classifier,
    MixingNet,
    Net,
    TwoLayerNet,
    WithoutForward,
    WithoutValidation,
    dataset,
    loaders,
    quiet_trainer,
)

KEYS = ["hessian_trace", "log10_relative_flatness", "relative_flatness", "weight_norm"]
MONITOR = "flatness/relative_flatness"


class Recorder(Callback):
    """What is logged at every validation, and the weights it belongs to."""

    def __init__(self):
        self.logged, self.nets = [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == dataloader_idx == 0:
            self.nets.append(copy.deepcopy(pl_module.net))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def flatness(self, key=MONITOR):
        return [logged[key] for logged in self.logged]


def expected(net, batches, measure="relative_flatness"):
    return getattr(lf.measure_flatness(net, batches), measure)


def fit(folder, *callbacks, module=None, data=None, **options):
    trainer = quiet_trainer(folder, *callbacks, **options)
    trainer.fit(Classifier() if module is None else module, *(loaders() if data is None else data))
    return trainer


def flatness_callback(**options):
    return lf.FlatnessCallback(**({"summary": False} | options))


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"])
def test_logged_values_are_those_of_measure_flatness(tmp_path, dtype, rtol):
    recorder, (train, val) = Recorder(), loaders(dtype=dtype)
    fit(tmp_path, flatness_callback(), recorder, module=Classifier().to(dtype), data=(train, val), max_epochs=3)
    assert len(recorder.logged) == 3
    for logged, net in zip(recorder.logged, recorder.nets, strict=True):
        report = lf.measure_flatness(net, val)
        assert sorted(logged) == [*(f"flatness/{key}" for key in KEYS), "val_acc"]
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


@pytest.mark.parametrize("data", ["val", "train"])
def test_mixed_precision_is_measured_in_full_precision(tmp_path, data):
    recorder, (train, val) = Recorder(), loaders()
    fit(tmp_path, flatness_callback(data=data), recorder, data=(train, val), precision="bf16-mixed")
    wanted = expected(recorder.nets[-1], val if data == "val" else train)
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


def test_fit_validate_and_test_give_identical_numbers(tmp_path):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    trainer = fit(tmp_path, callback, module=module, data=(train, val))
    in_fit = {key: float(value) for key, value in trainer.callback_metrics.items()}
    history = list(callback.history)
    (validated,) = trainer.validate(module, val, verbose=False)
    (tested,) = trainer.test(module, val, verbose=False)
    assert MONITOR in in_fit
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
    assert sorted(recorder.logged[-1]) == [*(f"sharp/{key}" for key in KEYS), "val_acc"]


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


def test_two_callbacks_with_one_prefix_are_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        quiet_trainer(tmp_path, flatness_callback(), flatness_callback())


# ------------------------------------------------------------------------------------------------------------ monitors


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}], ids=str)
def test_monitors_see_the_value_of_this_validation(tmp_path, first, options):
    class Halving(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            frequency = options.get("check_val_every_n_epoch", 1)
            scheduler = {"scheduler": self.scheduler, "monitor": MONITOR, "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    class Watched(EarlyStopping):
        seen = ()

        def _evaluate_stopping_criteria(self, current):
            self.seen = (*self.seen, float(current))
            return super()._evaluate_stopping_criteria(current)

    checkpoint = ModelCheckpoint(tmp_path, monitor=MONITOR, save_top_k=-1, filename="{epoch}-{step}")
    callback, stopping, module = flatness_callback(), Watched(MONITOR, patience=100), Halving()
    others = [stopping, checkpoint]
    fit(tmp_path, *([callback, *others] if first else [*others, callback]), module=module, max_epochs=4, **options)

    history = [record["relative_flatness"] for record in callback.history]
    assert len(history) == {"val_check_interval": 8, "check_val_every_n_epoch": 2}.get(next(iter(options), ""), 4)
    assert list(stopping.seen) == history
    assert [float(score) for score in checkpoint.best_k_models.values()] == history
    assert float(checkpoint.best_model_score) == min(history)
    if "val_check_interval" not in options:
        assert module.scheduler.best == min(history)
        reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
            torch.optim.SGD([torch.zeros(1)], lr=0.05), patience=0, factor=0.5
        )
        for value in history:
            reference.step(value)
        assert module.scheduler.get_last_lr() == reference.get_last_lr()


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_monitors_see_the_training_data_without_validation(tmp_path, first):
    callback = flatness_callback(data="train")
    checkpoint = ModelCheckpoint(
        tmp_path, monitor=MONITOR, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True
    )
    others = [EarlyStopping(MONITOR, patience=100), checkpoint]
    train, _ = loaders()
    fit(tmp_path, *([callback, *others] if first else [*others, callback]), data=(train,))
    history = [record["relative_flatness"] for record in callback.history]
    assert float(others[0].best_score) == min(history)
    assert [float(score) for score in checkpoint.best_k_models.values()] == history


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_flatness_stopping_sees_the_training_data_without_validation(tmp_path, first):
    class WithTrainAccuracy(WithoutValidation):
        def training_step(self, batch, batch_idx):
            self.log("acc", 0.5, on_epoch=True)
            return super().training_step(batch, batch_idx)

    callback, stopping = flatness_callback(data="train"), lf.FlatnessStopping(accuracy="acc", burn_in=0, patience=50)
    pair = [callback, stopping] if first else [stopping, callback]
    fit(tmp_path, *pair, module=WithTrainAccuracy(), data=loaders()[:1])
    assert float(stopping.best_score) == min(record["relative_flatness"] for record in callback.history)


# -------------------------------------------------------------------------------------------------- when, how many


def test_every_n_epochs(tmp_path):
    callback = flatness_callback(every_n_epochs=2)
    fit(tmp_path, callback, max_epochs=5)
    assert [record["epoch"] for record in callback.history] == [0, 2, 4]


def test_every_n_epochs_measures_every_validation_of_such_an_epoch(tmp_path):
    callback = flatness_callback(every_n_epochs=2)
    fit(tmp_path, callback, max_epochs=3, val_check_interval=0.5)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 2), (0, 4), (2, 10), (2, 12)]


def test_every_n_epochs_goes_on_after_a_resume(tmp_path):
    trainer = fit(tmp_path, flatness_callback(every_n_epochs=3), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    callback = flatness_callback(every_n_epochs=3)
    quiet_trainer(tmp_path, callback, max_epochs=7).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "two.ckpt")
    assert [record["epoch"] for record in callback.history] == [0, 3, 6]


def chosen_samples(max_samples, *datasets):
    whole = ConcatDataset(datasets)
    return DataLoader(Subset(whole, choose(len(whole), max_samples, labels_of(whole)).tolist()), batch_size=8)


def test_max_samples_measures_the_same_subset_in_every_epoch(tmp_path):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(max_samples=5)
    fit(tmp_path, callback, recorder, data=(train, val), max_epochs=3)
    for logged, net in zip(recorder.flatness(), recorder.nets, strict=True):
        assert logged == pytest.approx(expected(net, chosen_samples(5, val.dataset)), rel=1e-6)
    assert callback.report.num_samples == 5


@pytest.mark.parametrize("max_samples", [22, 1000])
def test_max_samples_of_all_samples_is_everything(tmp_path, max_samples):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, recorder, data=(train, val))
    assert callback.report.num_samples == 22
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)


@pytest.mark.parametrize("max_samples", [1, 4, 100])
@pytest.mark.parametrize("options", [{"limit_val_batches": 1}, {"fast_dev_run": True}], ids=str)
def test_max_samples_are_chosen_among_the_batches_that_are_run(tmp_path, options, max_samples):
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, **options)
    assert callback.report.num_samples == min(max_samples, 8)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(16))


def test_max_samples_of_a_stream_are_its_first(tmp_path):
    recorder, callback = Recorder(), flatness_callback(max_samples=5)
    fit(tmp_path, callback, recorder, data=(loaders()[0], DataLoader(Stream(), batch_size=8)))
    x, y = dataset(16)[:5]
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], [(x, y)]), rel=1e-6)


class Batches(Dataset):
    """Has batches ready, for a loader with batch_size=None."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dataset(32)[8 * index : 8 * index + 8]


@pytest.mark.parametrize("options", [{}, {"max_samples": 5}, {"data": "train"}], ids=str)
def test_loaders_of_ready_batches(tmp_path, options):
    recorder, loader = Recorder(), DataLoader(Batches(), batch_size=None)
    callback = flatness_callback(**options)
    fit(tmp_path, callback, recorder, data=(loader, loader))
    assert callback.report.num_samples == options.get("max_samples", 32)
    if "max_samples" not in options:
        wanted = expected(recorder.nets[-1], DataLoader(dataset(32), batch_size=8))
        assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("max_samples", [None, 7])
@pytest.mark.parametrize("kind", [list, lambda parts: dict(enumerate(parts))], ids=["list", "dict"])
def test_several_validation_loaders_are_measured_as_one(tmp_path, kind, max_samples):
    recorder, (train, val) = Recorder(), loaders()
    other = DataLoader(dataset(9, seed=5), batch_size=8)
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, recorder, data=(train, kind([val, other])))
    batches = [*val, *other] if max_samples is None else chosen_samples(7, val.dataset, other.dataset)
    assert callback.report.num_samples == (max_samples or 31)
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], batches), rel=1e-6)


@pytest.mark.parametrize("sanity", [0, 2])
def test_sanity_check_is_not_in_the_history(tmp_path, sanity):
    callback = flatness_callback()
    fit(tmp_path, callback, num_sanity_val_steps=sanity)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 4), (1, 8)]


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


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_at_rare_epochs_is_no_lack_of_validation(tmp_path, sanity):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        fit(tmp_path, flatness_callback(), num_sanity_val_steps=sanity, check_val_every_n_epoch=2)


# ------------------------------------------------------------------------------------------------------- training data


@pytest.mark.parametrize("max_samples", [None, 10])
def test_training_data_is_measured_in_evaluation_mode(tmp_path, max_samples):
    recorder, (train, val) = Recorder(), loaders(dtype=torch.float64)
    callback = flatness_callback(data="train", max_samples=max_samples)
    fit(tmp_path, callback, recorder, module=Classifier().double(), data=(train, val), max_epochs=3)
    batches = train if max_samples is None else batches_of(FixedSubset(train, 10))
    assert callback.report.num_samples == (max_samples or 32)
    for logged, net in zip(recorder.flatness(), recorder.nets, strict=True):
        assert logged == pytest.approx(expected(net, batches), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.25}, {"limit_val_batches": 1}], ids=str)
def test_training_data_is_all_measured_however_validation_goes(tmp_path, options):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(data="train")
    fit(tmp_path, callback, recorder, data=(train, [val, val]), **options)
    assert callback.report.num_samples == 32
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], train), rel=1e-6)


@pytest.mark.parametrize("how", ["no loader", "no validation_step", "limit_val_batches=0"])
def test_training_data_without_validation(tmp_path, how):
    train, val = loaders()
    module = (WithoutValidation if how == "no validation_step" else Classifier)()
    callback = flatness_callback(data="train", every_n_epochs=2)
    options = {"limit_val_batches": 0} if how.startswith("limit") else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        data = (train,) if how == "no loader" else (train, val)
        fit(tmp_path, callback, module=module, data=data, max_epochs=3, **options)
    assert [record["epoch"] for record in callback.history] == [0, 2]
    assert callback.history[-1]["relative_flatness"] == pytest.approx(expected(module.net, train), rel=1e-6)


def batches_of(subset):
    return list(subset.batches(Net()))


class Augmented(Dataset):
    """Noise from all three global generators."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.randn(()) + 0.1 * float(np.random.randn()) + 0.1 * random.gauss(0, 1), y  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_draw_the_same_in_every_epoch(workers):
    loader = DataLoader(Augmented(dataset(12)), batch_size=4, shuffle=True, num_workers=workers)
    subset = FixedSubset(loader, 10)
    epochs = []
    for _ in range(2):
        epochs.append([x for x, _ in subset.batches(Net())])
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert [len(x) for x in epochs[0]] == [4, 4, 2]
    assert_close(epochs[0], epochs[1], rtol=0, atol=0)


def test_training_data_with_random_transforms(tmp_path):
    train, val = DataLoader(Augmented(dataset(24)), batch_size=8, shuffle=True), loaders()[1]
    recorder = Recorder()
    fit(tmp_path, flatness_callback(data="train"), recorder, data=(train, val))
    batches = batches_of(training_subset(train, None, 0, 1))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], batches), rel=1e-6)


@pytest.mark.parametrize("batched", [False, True], ids=["sampler", "batch_sampler"])
def test_samples_that_a_sampler_leaves_out_are_not_measured(tmp_path, batched):
    data, kept = dataset(32), list(range(0, 32, 3))
    sampler = SubsetRandomSampler(kept)
    if batched:
        train = DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    else:
        train = DataLoader(data, batch_size=4, sampler=sampler)
    recorder, callback = Recorder(), flatness_callback(data="train")
    fit(tmp_path, callback, recorder, data=(train, loaders()[1]))
    assert callback.report.num_samples == len(kept)
    wanted = expected(recorder.nets[-1], DataLoader(Subset(data, kept), batch_size=4))
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("train", "found"),
    [
        (DataLoader(Stream(), batch_size=8), "DataLoader over a Stream"),
        ([loaders()[0], loaders()[0]], "the Trainer has a list"),
        ({"a": loaders()[0], "b": loaders()[0]}, "the Trainer has a dict"),
    ],
    ids=["iterable", "list", "dict"],
)
def test_training_data_that_cannot_be_indexed_is_refused(tmp_path, train, found):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match=rf"data='train'.*one training DataLoader.*{found}.*data='val'"):
        fit(tmp_path, flatness_callback(data="train"), module=module, data=(train, loaders()[1]))
    assert module.training_steps == 0


@pytest.mark.parametrize("data", ["val", "train"])
def test_training_loader_is_iterated_by_the_trainer_alone(tmp_path, data):
    class Counting(DataLoader):
        iterations = 0

        def __iter__(self):
            type(self).iterations += 1
            return super().__iter__()

    counts = []
    for callbacks in [(), (flatness_callback(data=data),)]:
        Counting.iterations = 0
        train = Counting(dataset(16), batch_size=8)
        fit(tmp_path, *callbacks, data=(train, loaders()[1]), val_check_interval=0.5, num_sanity_val_steps=0)
        counts.append(Counting.iterations)
    assert counts[0] == counts[1] > 0


def test_training_data_is_not_measured_by_validate(tmp_path):
    trainer = quiet_trainer(tmp_path, flatness_callback(data="train"))
    with pytest.warns(UserWarning, match="data='train'.*fit only"):
        (logged,) = trainer.validate(Classifier(), loaders()[1], verbose=False)
    assert list(logged) == ["val_acc"]


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
        UserWarning, match="measures at validation.*'flatness/hessian_trace' and its kin will not be.*data='train'"
    ):
        fit(tmp_path, flatness_callback(), module=module, data=data, **options)


def test_network_of_a_module_without_forward(tmp_path):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(model="net")
    fit(tmp_path, callback, recorder, module=WithoutForward(), data=(train, val))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)
    assert list(callback.report.layers) == ["conv2"]


def test_nested_network(tmp_path):
    class Deep(WithoutForward):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"student": self.net})

    callback = flatness_callback(model="parts.student")
    fit(tmp_path, callback, module=Deep())
    assert list(callback.report.layers) == ["conv2"]


@pytest.mark.parametrize("model", ["nett", "lr", "net.nothing"])
def test_model_that_is_not_there_is_refused_by_name(tmp_path, model):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match=f"model='{model}'.*Classifier has no such module; there are: 'net'"):
        fit(tmp_path, flatness_callback(model=model), module=module)
    assert module.training_steps == 0


def test_missing_forward_is_refused_by_name(tmp_path):
    module = WithoutForward()
    with pytest.raises(lf.FlatnessError, match=r"WithoutForward has no forward\(\).*model=.*there are: 'net'"):
        fit(tmp_path, flatness_callback(), module=module)
    assert module.training_steps == 0


class DictData(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        x, y = dataset(20)[index]
        return {"face": x, "person": y, "id": str(index)}


class DictClassifier(Classifier):
    def split(self, batch):
        return batch["face"], batch["person"]


@pytest.mark.parametrize("options", [{}, {"data": "train"}, {"max_samples": 20}], ids=str)
def test_dict_batches(tmp_path, options):
    recorder, loader = Recorder(), DataLoader(DictData(), batch_size=8)
    callback = flatness_callback(batch_fn=lambda batch: (batch["face"], batch["person"]), **options)
    fit(tmp_path, callback, recorder, module=DictClassifier(), data=(loader, loader))
    wanted = expected(recorder.nets[-1], DataLoader(dataset(20), batch_size=8))
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train"])
def test_batches_of_another_structure_are_refused(tmp_path, data, sanity):
    module, loader = DictClassifier(), DataLoader(DictData(), batch_size=8)
    with pytest.raises(lf.BatchError, match="A batch is a dict.*batch_fn="):
        fit(tmp_path, flatness_callback(data=data), module=module, data=(loader, loader), num_sanity_val_steps=sanity)
    assert module.training_steps == 0


def test_targets_that_are_not_classes_are_refused(tmp_path):
    callback = flatness_callback(batch_fn=lambda batch: (batch[0], batch[1].double()))
    with pytest.raises(lf.BatchError, match="class indices"):
        fit(tmp_path, callback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss='hinge' is not known"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": ""}, "layers=''"),
        ({"data": "test"}, "'val', 'train', or a DataLoader or list of batches, not 'test'"),
        ({"data": 3}, "'val', 'train', or a DataLoader or list of batches, not 3"),
        ({"on_error": "ignore"}, "on_error is 'raise' or 'warn', not 'ignore'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': give 'float32' or 'float64'"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be a whole number, 1 at least.$"),
        ({"every_n_epochs": 1.5}, "every_n_epochs=1.5 must be a whole number"),
        ({"every_n_epochs": True}, "every_n_epochs=True must be a whole number"),
        ({"every_n_epochs": None}, "every_n_epochs=None must be a whole number"),
        ({"max_samples": 0}, "max_samples=0 must be a whole number, 1 at least, or None"),
        ({"max_samples": 10.0}, "max_samples=10.0 must be a whole number"),
        ({"max_samples": -1}, "max_samples=-1"),
        ({"prefix": ""}, "must be a string, and not empty"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.FlatnessCallback(**options)


def test_batches_that_can_be_read_once_only_are_refused():
    with pytest.raises(
        lf.FlatnessError, match="data is 'val', 'train', or a DataLoader or list of batches, not <list_it"
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


# ------------------------------------------------------------------------------------------------------------- history


def test_history_is_plain_numbers(tmp_path):
    recorder, callback = Recorder(), flatness_callback()
    fit(tmp_path, callback, recorder, max_epochs=3)
    assert len(callback.history) == 3
    for epoch, (record, logged) in enumerate(zip(callback.history, recorder.logged, strict=True)):
        assert {key: type(value) for key, value in record.items()} == {
            "epoch": int,
            "step": int,
            "accuracy": float,
            "hessian_trace": float,
            "relative_flatness": float,
            "weight_norm": float,
        }
        assert (record["epoch"], record["step"]) == (epoch, 4 * (epoch + 1))
        assert record["accuracy"] == logged["val_acc"]
        for key in ("hessian_trace", "relative_flatness", "weight_norm"):
            assert record[key] == logged[f"flatness/{key}"]


class LateAccuracy(Classifier):
    """Logs one accuracy in training, and that of the validation at the end of its epoch."""

    def training_step(self, batch, batch_idx):
        self.log("acc", 0.125)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        self.log("val/Accuracy", 0.25 * (1 + self.current_epoch))


@pytest.mark.parametrize(
    ("accuracy", "values"), [(None, [0.25, 0.5]), ("acc", [0.125, 0.125]), ("nowhere", [None, None])]
)
def test_history_pairs_flatness_with_accuracy(tmp_path, accuracy, values):
    callback = flatness_callback(accuracy=accuracy)
    fit(tmp_path, callback, module=LateAccuracy())
    assert [record["accuracy"] for record in callback.history] == values


def test_history_without_validation_pairs_flatness_with_accuracy_of_the_epoch(tmp_path):
    class Late(WithoutValidation):
        def on_train_epoch_end(self):
            self.log("acc", 0.25 * (1 + self.current_epoch))

    callback = flatness_callback(data="train")
    fit(tmp_path, callback, module=Late(), data=loaders()[:1])
    assert [record["accuracy"] for record in callback.history] == [0.25, 0.5]


def test_history_without_any_accuracy(tmp_path):
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    callback = flatness_callback()
    fit(tmp_path, callback, module=Silent())
    assert [record["accuracy"] for record in callback.history] == [None, None]


@pytest.mark.parametrize("data", ["val", "train"])
def test_resume_continues_the_history(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, second = flatness_callback(data=data), flatness_callback(data=data)
    fit(tmp_path, first, checkpoint)
    path = tmp_path / "epoch=1.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["FlatnessCallback[prefix=flatness]"]
    assert state == {"history": first.history}

    quiet_trainer(tmp_path, second, max_epochs=4).fit(Classifier(), *loaders(), ckpt_path=path)
    assert second.history[:2] == first.history
    assert [record["epoch"] for record in second.history] == [0, 1, 2, 3]


def test_checkpoint_of_an_epoch_contains_its_measurement(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor=MONITOR, filename="{epoch}", save_top_k=-1)
    callback = flatness_callback(data="train")
    fit(tmp_path, checkpoint, callback)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["history"] == callback.history[:1]


def test_second_fit_starts_a_new_history(tmp_path):
    callback = flatness_callback()
    for epochs in (3, 2):
        fit(tmp_path, callback, max_epochs=epochs)
        assert [record["epoch"] for record in callback.history] == list(range(epochs))


def test_a_fit_after_a_resumed_one_starts_a_new_history(tmp_path):
    trainer, callback = fit(tmp_path, flatness_callback()), flatness_callback()
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "two.ckpt")
    fit(tmp_path, callback)
    assert [record["epoch"] for record in callback.history] == [0, 1]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("run", ["validate", "test"])
def test_what_was_measured_before_fit_is_not_in_the_history(tmp_path, run, sanity):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    trainer = quiet_trainer(tmp_path, callback, num_sanity_val_steps=sanity)
    getattr(trainer, run)(module, val, verbose=False)
    trainer.fit(module, train, val)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 4), (1, 8)]


def test_validating_a_checkpoint_leaves_the_history(tmp_path):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(tmp_path, callback, checkpoint, module=module, data=(train, val))
    history = copy.deepcopy(callback.history)
    for run in (trainer.validate, trainer.test):
        (logged,) = run(module, val, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert logged[MONITOR] == history[0]["relative_flatness"]
        assert callback.history == history
    fit(tmp_path, callback, max_epochs=1)
    assert len(callback.history) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("data", [None, "val", "train"], ids=["fresh", "val", "train"])
def test_callback_can_be_copied_and_pickled(tmp_path, data, duplicate):
    callback = flatness_callback(data=data or "val", max_samples=9)
    if data:
        fit(tmp_path, callback)
    copied = duplicate(callback)
    assert copied.history == callback.history
    fit(tmp_path, copied)
    assert len(copied.history) == 2


# ------------------------------------------------------------------------------------------------- the rest of the run


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("sanity", [0, 2])
def test_summary_is_printed_once(tmp_path, capsys, sanity, data):
    fit(tmp_path, lf.FlatnessCallback(data=data), num_sanity_val_steps=sanity)
    printed = capsys.readouterr().out
    named = {"val": "validation", "train": "training"}[data]
    assert printed.count(f"Flatness on {named} data is measured for these layers, under 'flatness'.") == 1
    assert "net.conv2" in printed


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


def hooks(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    ]


class Failing(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and not self.trainer.sanity_checking:
            raise RuntimeError("the user's own")


def test_failing_validation_step_leaves_no_trace(tmp_path):
    module, callback = Failing(), flatness_callback()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, callback, module=module)
    assert not hooks(module)
    assert callback.history == []
    fit(tmp_path, callback)
    assert len(callback.history) == 2


@pytest.mark.parametrize("module", [Classifier, Failing])
@pytest.mark.parametrize("data", ["val", "train"])
def test_data_and_model_are_let_go(tmp_path, module, data):
    callback, network, (train, val) = flatness_callback(data=data), module(), loaders()
    kept = {"model": network.net, "training data": train.dataset, "validation data": val.dataset}
    kept = {name: weakref.ref(thing) for name, thing in kept.items()}
    try:
        fit(tmp_path, callback, module=network, data=(train, val))
    except RuntimeError:
        assert module is Failing
    for name in ("log", "log_dict"):  # Lightning gives every callback these methods of the module
        vars(callback).pop(name)
    del network, train, val
    gc.collect()
    assert [name for name, thing in kept.items() if thing() is not None] == []


def test_failing_measurement_leaves_no_trace(tmp_path):
    broken = dataset(22, seed=1)
    broken.tensors[0][12] = torch.nan
    module = Classifier()
    with pytest.raises(lf.BatchError, match="NaN"):
        fit(tmp_path, flatness_callback(), module=module, data=(loaders()[0], DataLoader(broken, batch_size=8)))
    assert not hooks(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


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


def test_ranks_have_probes_of_their_own(tmp_path, monkeypatch):
    seeds = []

    class Recorded(FlatnessObserver):
        def __init__(self, *args, **options):
            seeds.append(options["seed"])
            super().__init__(*args, **options)

    monkeypatch.setattr("lightning_flatness.measure.flatness.FlatnessObserver", Recorded)
    for rank in (0, 1):
        monkeypatch.setattr("lightning_flatness.measure.flatness.own_rank", lambda rank=rank: rank)
        fit(tmp_path, flatness_callback(seed=7), max_epochs=1)
    assert len(set(seeds)) == 2
    assert seeds[0] == 7
