"""When a callback measures and logs, and who sees the values."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_flatness as lf
from tests.callbacks.flatness_runs import MONITOR, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, WithoutValidation, loaders, quiet_trainer
from tests.guarding import guards


@guards("callbacks.flatness:FlatnessCallback.on_validation_epoch_end", body="pass", ids="{}-last")
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


@guards("callbacks.flatness:FlatnessCallback.is_due", returns=True)
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


@pytest.mark.parametrize("sanity", [0, 2])
def test_sanity_check_is_not_in_the_history(tmp_path, sanity):
    callback = flatness_callback()
    fit(tmp_path, callback, num_sanity_val_steps=sanity)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 4), (1, 8)]


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_at_rare_epochs_is_no_lack_of_validation(tmp_path, sanity):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        fit(tmp_path, flatness_callback(), num_sanity_val_steps=sanity, check_val_every_n_epoch=2)
