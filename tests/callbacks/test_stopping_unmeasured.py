"""FlatnessStopping at validations without a measurement."""

import warnings

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, FailingWhenMeasured, loaders, quiet_trainer
from tests.guarding import guards


def counting(folder, callback, module, **options):
    """Epochs until a run stops in which nothing ever gets better."""
    stopping = lf.FlatnessStopping(burn_in=0, patience=3)
    trainer = quiet_trainer(folder, stopping, callback, max_epochs=20, num_sanity_val_steps=0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, *loaders())
    return trainer.current_epoch


@guards("callbacks.stopping:FlatnessStopping._is_new", returns=True)
def test_a_stale_value_does_not_count(tmp_path):
    """One better value, the first, and three that are not."""
    assert counting(tmp_path, lf.FlatnessCallback(), Classifier(lr=0.0)) == 4
    assert counting(tmp_path, lf.FlatnessCallback(every_n_epochs=3), Classifier(lr=0.0)) == 10


@guards("callbacks/stopping.py", "number == self", "number <= self")
def test_the_next_fit_may_have_another_callback(tmp_path):
    """The number of its measurements is not less because it is a new one."""
    stopping = lf.FlatnessStopping(burn_in=0, patience=3)
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, lf.FlatnessCallback(summary=False), stopping, max_epochs=20)
        trainer.fit(Classifier(lr=0.0), *loaders())
        assert trainer.current_epoch == 4


class InTurn(lf.FlatnessCallback):
    """Measures in epochs that have this remainder by two."""

    remainder = 0

    def is_due(self, trainer):
        return trainer.current_epoch % 2 == self.remainder


@guards(
    "callbacks/stopping.py",
    "            return False\n        self._num_measured",
    "            pass\n        self._num_measured",
)
def test_two_callbacks_that_never_measure_together(tmp_path):
    """Values count when both are new: after every second epoch."""
    odd = InTurn(prefix="odd", summary=False)
    odd.remainder = 1
    keys = ["odd/relative_flatness", "even/relative_flatness"]
    stopping = lf.FlatnessStopping(keys, burn_in=0, patience=3)
    callbacks = odd, InTurn(prefix="even", summary=False), stopping
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=20, num_sanity_val_steps=0)
    trainer.fit(Classifier(lr=0.0), *loaders())
    assert trainer.current_epoch == 8


def test_a_failed_measurement_does_not_count(tmp_path):
    assert counting(tmp_path, lf.FlatnessCallback(on_error="warn"), FailingWhenMeasured({0, 1, 3}, lr=0.0)) == 7


@pytest.mark.parametrize("data", ["val", "train"])
def test_stale_values_of_resumed_runs_do_not_count(tmp_path, data):
    def callbacks():
        return lf.FlatnessCallback(every_n_epochs=3, data=data), lf.FlatnessStopping(burn_in=0, patience=3)

    checkpoint = ModelCheckpoint(tmp_path, filename="part")
    quiet_trainer(tmp_path, *callbacks(), checkpoint, max_epochs=5).fit(Classifier(lr=0.0), *loaders())
    # This one would fail if nothing were logged in a resumed run.
    early = EarlyStopping("flatness/relative_flatness", patience=100)
    trainer = quiet_trainer(tmp_path, *callbacks(), early, max_epochs=20)
    trainer.fit(Classifier(lr=0.0), *loaders(), ckpt_path=tmp_path / "part.ckpt")
    assert trainer.current_epoch == 10


SPECTRUM = "spectrum/lambda_max"


def spectrum_callback(**options):
    return lf.SpectrumCallback(every_n_epochs=1, top_k=1, num_steps=2, num_probes=1, **options)


class OnlyTrained(FailingWhenMeasured):
    """Logs an accuracy that never gets better, and has no validation."""

    validation_step = LightningModule.validation_step

    def training_step(self, batch, batch_idx):
        self.log("train_acc", 0.5, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("failing", "epochs"), [((), 4), ((0, 1, 3), 7)], ids=["measured", "failed"])
def test_a_failed_spectrum_does_not_count(tmp_path, failing, epochs):
    stopping = lf.FlatnessStopping(SPECTRUM, accuracy="train_acc", burn_in=0, patience=3)
    trainer = quiet_trainer(tmp_path, spectrum_callback(on_error="warn"), stopping, max_epochs=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(OnlyTrained(set(failing), lr=0.0), loaders()[0])
    assert trainer.current_epoch == epochs


def test_what_is_measured_at_the_end_of_epochs_cannot_be_checked_after_validations(tmp_path):
    stopping = lf.FlatnessStopping(SPECTRUM, burn_in=0)
    trainer = quiet_trainer(tmp_path, spectrum_callback(), stopping)
    with pytest.raises(lf.FlatnessError, match="'spectrum/...' .*SpectrumCallback measures at the end of epochs"):
        trainer.fit(Classifier(), *loaders())
