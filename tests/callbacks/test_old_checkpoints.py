"""A checkpoint of version 0.1.0 is resumed: histories go on, and so do the counters of the stopping.

``tests/data/checkpoint_0_1.ckpt`` is what ``fit(folder, 2).save_checkpoint(CHECKPOINT)`` below wrote with that version.
"""

import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import quiet_trainer

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoint_0_1.ckpt"
STOPPING = "FlatnessStopping[min flatness/relative_flatness, max val_acc]"
HISTORIES = [f"{name}Callback[prefix={name.lower()}]" for name in ("Flatness", "Spectrum", "Landscape")]


class Classifier(L.LightningModule):
    """Its weights stay as they are, so that nothing gets better and all that is measured stays, too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)


def loader():
    x = torch.arange(12.0 * 36).square().remainder(7).sub(3).reshape(12, 1, 6, 6)
    return DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=5)


def callbacks():
    return [
        lf.FlatnessCallback(summary=False),
        lf.FlatnessStopping(burn_in=0, patience=2),
        # Eigenvectors are in the trace; those of the file were closer to the exact ones than the default asks for.
        lf.SpectrumCallback(every_n_epochs=1, num_steps=3, num_probes=2, top_k=1, tolerance=1e-6),
        lf.LandscapeCallback(every_n_epochs=1, steps=3),
    ]


def fit(folder, max_epochs, **options):
    """A fit whose Trainer has all callbacks that keep something."""
    trainer = quiet_trainer(folder, *callbacks(), max_epochs=max_epochs)
    if options and "weights_only" in inspect.signature(trainer.fit).parameters:
        options["weights_only"] = True
    trainer.fit(Classifier(), loader(), loader(), **options)
    return trainer


@pytest.fixture(scope="module")
def saved():
    return torch.load(CHECKPOINT, weights_only=True)["callbacks"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """More epochs than there are left to wait."""
    trainer = fit(tmp_path_factory.mktemp("resumed"), 6, ckpt_path=CHECKPOINT)
    return trainer, {callback.state_key: callback for callback in trainer.callbacks}


def test_the_checkpoint_holds_what_is_to_be_taken(saved):
    assert set(saved) == {STOPPING, *HISTORIES}
    assert [[record["epoch"] for record in saved[key]["history"]] for key in HISTORIES] == [[0, 1]] * 3
    assert {name: kept["wait_count"] for name, kept in saved[STOPPING]["watched"].items()} == {
        "flatness/relative_flatness": 1,
        "val_acc": 1,
    }
    assert CHECKPOINT.stat().st_size < 50_000


@pytest.mark.parametrize("key", HISTORIES)
def test_the_history_goes_on(resumed, saved, key):
    _, found = resumed
    old, new = saved[key]["history"], found[key].history
    assert new[:2] == old
    assert [(record["epoch"], record["step"]) for record in new] == [(0, 3), (1, 6), (2, 9)]


@pytest.mark.parametrize("key", HISTORIES)
def test_the_same_weights_have_the_same_numbers(resumed, key):
    _, found = resumed
    old, new = found[key].history[1:]
    assert old.keys() <= new.keys()
    numbers = [name for name, value in old.items() if isinstance(value, float)]
    assert len(numbers) > 2
    assert_close([new[name] for name in numbers], [old[name] for name in numbers], rtol=1e-4, atol=1e-6)


def test_the_stopping_goes_on_counting(resumed, saved):
    trainer, found = resumed
    assert trainer.current_epoch == 3  # one more validation without an improvement, of the two to wait for
    stopping, kept = found[STOPPING], saved[STOPPING]
    assert (stopping.stopped_epoch, stopping.wait_count, stopping.accuracy_wait_count) == (2, 2, 2)
    assert_close(stopping.best_score, kept["best_score"], rtol=0, atol=0)
    assert_close(stopping.best_accuracy, kept["watched"]["val_acc"]["best"], rtol=0, atol=0)
