"""What the spectrum and the landscape callback have in common: when, on which data, without a trace."""

import contextlib
import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, end_of, num_hooks
from tests.callbacks.lightning_modules import (
    Classifier,
    WithoutForward,
    WithoutValidation,
    dataset,
    loaders,
    quiet_trainer,
)
from tests.callbacks.resources import Watch, growth
from tests.callbacks.training_runs import RUNS, DrawsOneNumber, assert_identical, end_of_run

KINDS = {
    "spectrum": partial(lf.SpectrumCallback, top_k=1, num_steps=3, num_probes=2, max_products=3),
    "landscape": partial(lf.LandscapeCallback, steps=3, batch_norm="both"),
}
# The others are slow only because there are many.
QUICK = ("plain", "dropout and shuffling", "augmentation", "frozen BatchNorm", "averaged weights")
kinds = pytest.mark.parametrize("kind", KINDS)


def fit(folder, *callbacks, module=None, data=None, **options):
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}
    trainer = quiet_trainer(folder, *callbacks, **options)
    module = module or Classifier()
    torch.manual_seed(0)
    trainer.fit(module, *(data or loaders()))
    return trainer


def epochs(callback):
    return [record["epoch"] for record in callback.history]


# ------------------------------------------------------------------------------------------------------------ no trace


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize(
    "run", [run if run in QUICK else pytest.param(run, marks=pytest.mark.slow) for run in RUNS if "workers" not in run]
)
def test_training_is_bit_identical(tmp_path, end_without, run, data):
    callbacks = [make(data=data, every_n_epochs=1) for make in KINDS.values()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(WeightAveraging|clipped)")
        assert_identical(end_of_run(run, tmp_path, *callbacks), end_without(run))
    assert all(epochs(callback) == [0, 1, 2] for callback in callbacks)


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
    with pytest.warns(UserWarning, match=f"has no {kind} for epoch 1; it failed: .*the model's own"):
        trainer = fit(tmp_path, callback, module=module)
    assert_same(end_of(trainer, module), end)
    assert epochs(callback) == [0, 2]


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
    with pytest.raises(lf.FlatnessError, match="data='val', and this fit has no validation"):
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
    with pytest.raises(lf.FlatnessError, match="needs one validation loader, and there are 2"):
        fit(tmp_path, KINDS[kind](data="val"), data=(train, [val, val]))


@kinds
def test_trial_run(tmp_path, kind):
    callback = KINDS[kind]()
    fit(tmp_path, callback, fast_dev_run=True)
    assert epochs(callback) == [0]
    assert not list(tmp_path.rglob("*.npz"))


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


# --------------------------------------------------------------------------------------------------- loggers and files


@kinds
def test_files_load_without_pickle(tmp_path, kind):
    fit(tmp_path, KINDS[kind](every_n_epochs=2))
    names = sorted(path.name for path in (tmp_path / kind).iterdir())
    suffixes = [".npz"] if kind == "spectrum" else ["-kept.npz", "-recomputed.npz"]
    assert names == [f"epoch={epoch}-step={4 * epoch + 4}{suffix}" for epoch in (0, 2) for suffix in suffixes]
    record = lf.SpectrumResult if kind == "spectrum" else lf.LandscapeResult
    assert record.load(tmp_path / kind / names[-1]).num_samples == 32


@kinds
def test_files_go_where_they_are_wanted(tmp_path, kind):
    fit(tmp_path, KINDS[kind](folder=str(tmp_path / "here" / "there")))
    assert list((tmp_path / "here" / "there").glob("*.npz"))


@kinds
def test_files_that_cannot_be_written(tmp_path, kind):
    (tmp_path / "file").touch()
    callback = KINDS[kind](folder=str(tmp_path / "file"), on_error="warn")
    with pytest.warns(UserWarning, match=f"has no {kind} for the files of the end of the fit; it failed"):
        fit(tmp_path, callback)
    assert epochs(callback) == [2]


@kinds
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
    assert (tmp_path / "lightning_logs" / "version_0" / kind).exists()


@kinds
def test_no_figures(tmp_path, kind):
    fit(tmp_path, KINDS[kind](figures=False), logger=TensorBoardLogger(tmp_path))
    assert not EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload().Tags()["images"]


@kinds
def test_other_loggers(tmp_path, kind):
    fit(tmp_path, KINDS[kind](), logger=CSVLogger(tmp_path))
    assert (tmp_path / "lightning_logs" / "version_0" / kind).exists()


@kinds
def test_what_a_forward_logs_is_not_logged(tmp_path, kind):
    class Logs(Classifier):
        def forward(self, x):
            self.log("from forward", 1.0)
            return self.net(x)

    trainer = fit(tmp_path, KINDS[kind](every_n_epochs=1), module=Logs())
    assert "from forward" not in trainer.callback_metrics


# --------------------------------------------------------------------------------------------------------------- state


@kinds
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
    assert second.history[:2] == whole.history[:2]


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
    assert pair[0].history == pair[1].history
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()


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
        ({"data": "test"}, "data is 'val', 'train'"),
        ({"data": 3}, "data is"),
        ({"data": iter([1])}, "data is"),
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
    with pytest.warns(UserWarning, match=f"has no {kind} for the start of training; it failed: .*{named}"):
        fit(tmp_path, KINDS[kind](**options, on_error="warn"), module=module)
    assert module.training_steps == 12


# -------------------------------------------------------------------------------------------------------- command line


class Configured(Classifier):
    def __init__(self, lr: float = 0.02):
        super().__init__(lr=lr)

    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


OPTIONS = {
    "spectrum": {"params": ["net.conv1"], "top_k": 1, "num_steps": 3, "num_probes": 1, "loss": "cross_entropy"},
    "landscape": {"axes": ["hessian"], "span": [-0.5, 1.0], "steps": 3, "frozen": ["*.bias"], "normalize": "filter"},
}


@kinds
def test_command_line(tmp_path, kind):
    path = f"lightning_flatness.{kind.title()}Callback"
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": path, "init_args": {"every_n_epochs": 1, "dtype": "float64", **OPTIONS[kind]}}
            ],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = LightningCLI(Configured, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    assert epochs(found.trainer.callbacks[0]) == [0, 1]


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


@kinds
@pytest.mark.usefixtures("sigint_kept")
def test_an_interrupted_run_keeps_what_it_has(tmp_path, kind):
    class Interrupted(Classifier):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    callback = KINDS[kind](every_n_epochs=1)
    with contextlib.suppress(SystemExit):  # of recent Lightning; older ones return
        fit(tmp_path, callback, module=Interrupted(), logger=TensorBoardLogger(tmp_path), max_epochs=5)
    assert epochs(callback) == [0, 1]
    images = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload().Tags()["images"]
    assert ("spectrum/eigenvalues" in images) == (kind == "spectrum")


@kinds
def test_a_stream_of_training_data_is_refused(tmp_path, kind):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset(8))

    with pytest.raises(lf.FlatnessError, match="data='train' reads a fixed subset"):
        fit(tmp_path, KINDS[kind](), data=(DataLoader(Stream(), 4), loaders()[1]))
