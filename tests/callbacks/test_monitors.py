"""Lightning's own callbacks that watch flatness are warned of where they mislead."""

import warnings

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_flatness as lf
from lightning_flatness.callbacks.monitors import FLAT_IF_SMALL
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.flatness_runs import MONITOR, fit, flatness_callback, warnings_of
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards

RISES = "a network that has not learnt anything is flat, and the number rises at first"
WRONG_WAY = "takes the sharpest network for the best one: a small number means a flat network. Use mode='min'"


def traps(folder, *callbacks, run=fit, **options):
    """The warnings of a run that are about what a callback watches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(folder, *callbacks, **({"max_epochs": 1} | options))
    return [str(one.message) for one in caught if RISES in str(one.message) or WRONG_WAY in str(one.message)]


def checkpoint(folder, **options):
    return ModelCheckpoint(folder / "kept", **({"monitor": MONITOR} | options))


@guards(
    "callbacks/base.py", "warn_of_traps(trainer, self.prefix, self._errors.on_error)", "pass", ids="ModelCheckpoint"
)
@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_the_first_epochs_are_warned_of(tmp_path, kind):
    watching = checkpoint(tmp_path) if kind == "ModelCheckpoint" else EarlyStopping(MONITOR)
    (message,) = traps(tmp_path, flatness_callback(), watching, max_epochs=3)
    assert message.startswith(f"{kind}(monitor='{MONITOR}')")
    remedy = {"ModelCheckpoint": "FlatCheckpoint", "EarlyStopping": "FlatnessStopping"}[kind]
    assert f"Use {remedy}, which" in message
    assert "begins at a later epoch" in message


@guards("callbacks/monitors.py", 'if callback.mode == "max":', "if False:", ids="ModelCheckpoint")
@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_the_wrong_direction_is_warned_of(tmp_path, kind):
    kinds = {"ModelCheckpoint": checkpoint(tmp_path, mode="max"), "EarlyStopping": EarlyStopping(MONITOR, mode="max")}
    (message,) = traps(tmp_path, flatness_callback(), kinds[kind])
    assert message == f"{kind}(monitor='{MONITOR}', mode='max') {WRONG_WAY}."


@guards("callbacks/monitors.py", " and callback.check_finite", "", ids="not checked")
@pytest.mark.parametrize(
    ("on_error", "options", "is_trap"),
    [
        ("warn", {}, True),
        ("warn", {"monitor": "flatness/weight_norm"}, True),
        ("warn", {"check_finite": False}, False),
        ("warn", {"monitor": "val_acc"}, False),
        ("raise", {}, False),
    ],
    ids=["stops", "any key", "not checked", "of the module", "raises"],
)
def test_nan_that_stops_training_is_warned_of(tmp_path, on_error, options, is_trap):
    stopping = EarlyStopping(**({"monitor": MONITOR} | options))
    with warnings_of("check_finite=False") as said:
        fit(tmp_path, flatness_callback(on_error=on_error), stopping, max_epochs=1)
    assert len(said) == is_trap
    assert all(f"EarlyStopping(monitor='{stopping.monitor}')" in message for message in said)


@pytest.mark.parametrize(
    "options",
    [
        {"save_top_k": -1},
        {"save_top_k": 0},
        {"every_n_epochs": 2},
        {"monitor": "val_acc", "mode": "max"},
        {"monitor": "flatness/weight_norm"},
        {"monitor": "flatness/exact", "mode": "max"},
    ],
    ids=str,
)
def test_what_does_not_mislead_is_not_warned_of(tmp_path, options):
    assert not traps(tmp_path, flatness_callback(), checkpoint(tmp_path, **options), max_epochs=2)


def test_own_rules_and_subclasses_are_not_warned_of(tmp_path):
    class Later(EarlyStopping):
        """Begins at a later epoch."""

    own = [lf.FlatnessStopping(), lf.FlatCheckpoint(dirpath=tmp_path / "flat")]
    assert not traps(tmp_path, flatness_callback(), Later(MONITOR), *own)


@pytest.mark.parametrize("key", FLAT_IF_SMALL)
def test_all_keys_of_flatness_are_known(tmp_path, key):
    spectral = key in ("lambda_max", "trace")
    prefix = "spectrum" if spectral else "mine"
    early = EarlyStopping(f"{prefix}/{key}", strict=False)
    callback = KINDS["spectrum"](every_n_epochs=1) if spectral else flatness_callback(prefix=prefix)
    assert len(traps(tmp_path, callback, early)) == 1


def test_keys_of_layers_and_loaders(tmp_path):
    train, val = loaders()
    callbacks = [
        checkpoint(tmp_path / "a", monitor="flatness/net.conv2/relative_flatness"),
        checkpoint(tmp_path / "b", monitor="flatness/hessian_trace/dataloader_idx_1"),
    ]
    measured = flatness_callback(layers=["net.conv2", "net.conv1"])
    assert len(traps(tmp_path, measured, *callbacks, data=(train, [val, val]))) == 2


def test_of_several_callbacks_the_one_that_logs_the_key_warns(tmp_path):
    assert len(traps(tmp_path, flatness_callback(), flatness_callback(prefix="b"), checkpoint(tmp_path))) == 1


def test_a_resumed_run_is_past_the_first_epochs(tmp_path):
    def callbacks():
        return flatness_callback(), EarlyStopping(MONITOR, patience=9)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, *callbacks(), ModelCheckpoint(tmp_path, filename="part"))
    trainer = quiet_trainer(tmp_path, *callbacks(), max_epochs=3)

    def resume(*_, **__):
        trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "part.ckpt")

    assert not traps(tmp_path, run=resume)
