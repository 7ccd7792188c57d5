"""FlatCheckpoint at the end of epochs without a validation."""

import pytest

import lightning_flatness as lf
from tests.callbacks.epoch_end_runs import fit
from tests.callbacks.lightning_modules import Classifier
from tests.guarding import guards


class LogsInTraining(Classifier):
    def training_step(self, batch, batch_idx):
        self.log("train_acc", 0.5, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Falls(lf.SpectrumCallback):
    """Its largest eigenvalue falls in every epoch."""

    def _compute(self, trainer, network, batches, progress):
        return {"lambda_max": 9.0 - trainer.current_epoch}

    def _write(self, stem):
        return []


class Kept(lf.FlatCheckpoint):
    """Remembers the epochs that it has saved."""

    def __init__(self, folder, **options):
        super().__init__(dirpath=folder / "kept", within=1.0, save_on_train_epoch_end=True, **options)
        self.epochs = []

    def _save_checkpoint(self, trainer, path):
        self.epochs.append(trainer.current_epoch)
        super()._save_checkpoint(trainer, path)


@guards("callbacks/checkpoint.py", "self._validated_at != trainer.global_step", "False", ids="0-val_acc-expected0")
@pytest.mark.parametrize(("monitor", "expected"), [("val_acc", [1, 3]), ("train_acc", [0, 1, 2, 3])])
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.filterwarnings("ignore:.*is measured at the end of epochs")
def test_an_accuracy_of_earlier_weights_does_not_count(tmp_path, sanity, monitor, expected):
    kept = Kept(tmp_path, monitor=monitor, flatness="spectrum/lambda_max")
    options = {"max_epochs": 4, "check_val_every_n_epoch": 2, "num_sanity_val_steps": sanity}
    fit(tmp_path, Falls(every_n_epochs=1), kept, module=LogsInTraining(), **options)
    assert kept.epochs == expected
