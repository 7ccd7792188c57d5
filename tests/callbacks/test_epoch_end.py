"""What the spectrum and the landscape callback have in common: when, on which data, without a trace."""

import contextlib
import math
import warnings

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, end_of, num_hooks
from tests.callbacks.epoch_end_runs import KINDS, epochs, fit, kinds
from tests.callbacks.flatness_runs import Stream, flatness_callback
from tests.callbacks.lightning_modules import Classifier, Interrupted, WithoutValidation, dataset, loaders
from tests.callbacks.resources import Watch, growth
from tests.callbacks.training_runs import RUNS, DrawsOneNumber, assert_identical, end_of_run
from tests.guarding import guards

# The others are slow only because there are many.
QUICK = ("plain", "dropout and shuffling", "augmentation", "frozen BatchNorm", "averaged weights")


# ------------------------------------------------------------------------------------------------------------ no trace


@pytest.mark.slow
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize(
    "run", [run if run in QUICK else pytest.param(run, marks=pytest.mark.slow) for run in RUNS if "workers" not in run]
)
def test_training_is_bit_identical(tmp_path, end_without, run, data):
    callbacks = [make(data=data, every_n_epochs=1) for make in KINDS.values()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(WeightAveraging|clipped)")
        assert_identical(end_of_run(run, tmp_path, *callbacks), end_without(run))
    measured = [0, 1, 2, 2] if run == "averaged weights" else [0, 1, 2]  # the averages, too
    assert all(epochs(callback) == measured for callback in callbacks)


@pytest.mark.slow
def test_training_is_bit_identical_with_workers(tmp_path, end_without):
    callbacks = [make(every_n_epochs=1) for make in KINDS.values()]
    assert_identical(end_of_run("workers", tmp_path, *callbacks), end_without("workers"))


class DrawsAtTheEndOfAnEpoch(DrawsOneNumber):
    def on_train_epoch_end(self, trainer, pl_module):
        self.draw()


def test_a_trace_would_be_seen(tmp_path, end_without):
    draws = DrawsAtTheEndOfAnEpoch(lambda: torch.rand(()))
    with pytest.raises(AssertionError, match="different"):
        assert_identical(end_of_run("augmentation", tmp_path, draws), end_without("augmentation"))


class FailingWhenMeasured(nn.Module):
    """Fails in evaluation mode with weights of later epochs, when it is run outside of validation."""

    def __init__(self, net):
        super().__init__()
        self.net, self.broken = net, False

    def forward(self, x):
        if self.broken and not self.training:
            raise RuntimeError("something of the model's own")
        return self.net(x)


class Module(Classifier):
    """Breaks at the end of epoch 1, and is well again when the next begins."""

    def __init__(self, breaks=True):
        super().__init__()
        self.net = FailingWhenMeasured(self.net)
        self.breaks = breaks

    def on_train_epoch_start(self):
        self.net.broken = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.net.broken = self.breaks and self.current_epoch == 1
        return loss

    def on_validation_epoch_start(self):
        self.net.broken, self.kept = False, self.net.broken

    def on_validation_epoch_end(self):
        self.net.broken = self.kept


@kinds
def test_an_error_leaves_no_trace_and_training_goes_on_with_a_warning(tmp_path, kind):
    bare = Module(breaks=False)
    end = end_of(fit(tmp_path, module=bare), bare)
    module, callback = Module(), KINDS[kind](every_n_epochs=1, on_error="warn")
    with pytest.warns(UserWarning, match=f"has no {kind} for epoch 1; the measurement failed: .*the model's own"):
        trainer = fit(tmp_path, callback, module=module)
    assert_same(end_of(trainer, module), end)
    assert epochs(callback) == [0, 2]


@kinds
def test_monitors_read_nan_after_a_measurement_that_failed(tmp_path, kind):
    class Recording(Module):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            metrics = self.trainer.callback_metrics
            seen.append({key: float(value) for key, value in metrics.items() if key.startswith(f"{kind}/")})

    seen, callback = [], KINDS[kind](every_n_epochs=1, on_error="warn")
    with pytest.warns(UserWarning, match=f"has no {kind} for epoch 1"):
        fit(tmp_path, callback, module=Recording())
    assert seen[1].keys() == seen[2].keys() != set()
    assert all(value == 0 if key.endswith("/exact") else math.isnan(value) for key, value in seen[2].items())


@kinds
def test_an_error_is_raised_as_it_is(tmp_path, kind):
    module = Module()
    with pytest.raises((RuntimeError, lf.FlatnessError), match="something of the model's own"):
        fit(tmp_path, KINDS[kind](every_n_epochs=1), module=module)
    assert num_hooks(module) == 0


# ----------------------------------------------------------------------------------------------------------------- when


@kinds
@pytest.mark.parametrize(("every", "expected"), [(None, [3]), (1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3])])
def test_epochs(tmp_path, kind, every, expected):
    callback = KINDS[kind](every_n_epochs=every)
    fit(tmp_path, callback, max_epochs=4)
    assert epochs(callback) == expected
    assert callback.history[-1]["step"] == 16


@kinds
@pytest.mark.parametrize("data", ["train", "val", "given"])
def test_samples(tmp_path, kind, data):
    given = [dataset(5, seed=3)[:]]
    callback = KINDS[kind](data=given if data == "given" else data, max_samples=None if data == "given" else 12)
    fit(tmp_path, callback)
    result = callback.result if kind == "spectrum" else callback.results["kept"]
    assert result.num_samples == (5 if data == "given" else 12)


@kinds
@pytest.mark.parametrize(
    "options", [{"max_steps": 2}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 2}]
)
def test_odd_trainers(tmp_path, kind, options):
    callback = KINDS[kind](every_n_epochs=1)
    trainer = fit(tmp_path, callback, **options)
    assert callback.history[-1]["step"] == trainer.global_step


@kinds
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(tmp_path, kind, precision):
    callback = KINDS[kind]()
    fit(tmp_path, callback, precision=precision, max_epochs=1)
    assert epochs(callback) == [0]
    if kind == "spectrum":
        expected = torch.float64 if precision == "64-true" else torch.float32
        assert callback.result.eigenvectors.dtype == expected


@kinds
@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_networks_have_plain_names(tmp_path, kind, compiled):
    module = Classifier()
    if compiled:
        module.net = torch.compile(module.net, backend="eager")
    option = {"params": "net.conv1.*"} if kind == "spectrum" else {"frozen": "net.conv1.*"}
    callback = KINDS[kind](**option, folder=str(tmp_path))
    fit(tmp_path, callback, module=module, max_epochs=1)
    if kind == "spectrum":
        assert list(callback.result.parameters) == ["net.conv1.weight", "net.conv1.bias"]


@kinds
def test_without_validation(tmp_path, kind):
    callback = KINDS[kind]()
    fit(tmp_path, callback, module=WithoutValidation(), data=loaders()[:1])
    assert epochs(callback) == [2]
    with pytest.raises(lf.FlatnessError, match="Callback: data='val' needs validation, and this fit has none"):
        fit(tmp_path, KINDS[kind](data="val"), module=WithoutValidation(), data=loaders()[:1])


@kinds
def test_validation_data_that_come_later(tmp_path, kind):
    callback = KINDS[kind](data="val", every_n_epochs=1)
    fit(tmp_path, callback, check_val_every_n_epoch=2, max_epochs=4)
    assert epochs(callback) == [1, 2, 3]


@kinds
def test_validation_data_that_never_come(tmp_path, kind):
    callback = KINDS[kind](data="val", every_n_epochs=1)
    with pytest.warns(UserWarning, match="data='val'. has measured nothing"):
        fit(tmp_path, callback, check_val_every_n_epoch=5)
    assert not callback.history


@kinds
def test_two_validation_loaders_are_refused(tmp_path, kind):
    train, val = loaders()
    with pytest.raises(lf.FlatnessError, match="Callback: data='val' needs one validation loader, and there are 2"):
        fit(tmp_path, KINDS[kind](data="val"), data=(train, [val, val]))


@guards("callbacks/epoch_end.py", 'if getattr(trainer, "fast_dev_run", False):', "if False:")
@kinds
def test_trial_run(tmp_path, kind):
    callback = KINDS[kind]()
    fit(tmp_path, callback, fast_dev_run=True)
    assert epochs(callback) == [0]
    assert not list(tmp_path.rglob("*.npz"))


@guards("callbacks/data/sources.py", 'if getattr(trainer, "fast_dev_run", False) and', "if False and")
@pytest.mark.parametrize(
    ("data", "most", "expected"), [("train", None, 16), ("own", None, 16), ("train", 5, 5)], ids=str
)
@pytest.mark.parametrize("kind", [*KINDS, "flatness"])
def test_a_trial_run_measures_as_many_batches_as_it_trains_on(tmp_path, kind, data, most, expected):
    make = KINDS.get(kind, flatness_callback)
    callback = make(data=loaders()[1] if data == "own" else data, max_samples=most)
    fit(tmp_path, callback, fast_dev_run=2)
    assert callback.history[-1]["num_samples"] == expected


@kinds
def test_barebones(tmp_path, kind):
    callback = KINDS[kind](every_n_epochs=1)
    fit(tmp_path, callback, barebones=True)
    assert len(epochs(callback)) == 2 + 1 * (callback.history[-1]["epoch"] == 2)


@kinds
def test_validating_and_testing_measure_nothing(tmp_path, kind):
    callback = KINDS[kind]()
    trainer = fit(tmp_path, callback)
    trainer.validate(Classifier(), loaders()[1], verbose=False)
    trainer.test(Classifier(), loaders()[1], verbose=False)
    assert epochs(callback) == [2]


# --------------------------------------------------------------------------------------------------------------- soak


@pytest.mark.slow
def test_thirty_epochs(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    callbacks = [make(every_n_epochs=1) for make in KINDS.values()]
    watch = Watch(12, 30)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, *callbacks, watch, max_epochs=32, logger=logger, limit_train_batches=2, limit_val_batches=1)
    assert all(len(callback.history) == 32 for callback in callbacks)
    assert not growth(watch.found[12], watch.found[30])


@guards("callbacks/base.py", 'if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":', "if False:")
@kinds
@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has(tmp_path, kind):
    callback = KINDS[kind](every_n_epochs=1, figures_every=None)
    with contextlib.suppress(SystemExit):  # of recent Lightning; older ones return
        fit(tmp_path, callback, module=Interrupted(), logger=TensorBoardLogger(tmp_path), max_epochs=5)
    assert epochs(callback) == [0, 1]
    images = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload().Tags()["images"]
    assert ("spectrum/eigenvalues" in images) == (kind == "spectrum")


@kinds
def test_a_stream_of_training_data_is_refused(tmp_path, kind):
    with pytest.raises(lf.FlatnessError, match="data='train' reads a fixed subset"):
        fit(tmp_path, KINDS[kind](), data=(DataLoader(Stream(), 4), loaders()[1]))
