"""What fails on rank 1 only."""

import os
import warnings
from functools import partial

import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.callbacks.training_runs import end_of_training, seed_everything
from tests.distributed.scenarios import SCENARIOS, rank, trainer_on_ranks


def val_with_nan(position):
    """22 samples; rank 1 validates those at odd positions, in batches of four."""
    images, labels = dataset(22, seed=1).tensors
    images = images.clone()
    images[position] = torch.nan
    return DataLoader(TensorDataset(images, labels), 4)


NAN_AT = {"first batch": 3, "last batch": 21}


class Synced(Classifier):
    """Its accuracy is that of all ranks, so Lightning makes them wait for each other when it is logged."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).double().mean(), sync_dist=True, **self.options)


def nan_on_rank_1(where, callback, module_class=Classifier):
    """The error on a rank, if any, the warnings and what is logged and left behind."""
    seed_everything()
    callbacks = [] if callback is None else [callback()]
    module, trainer = module_class(), trainer_on_ranks(*callbacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            trainer.fit(module, DataLoader(dataset(32), 4, shuffle=True), val_with_nan(NAN_AT[where]))
        except lf.FlatnessError as raised:
            error = str(raised)
    return {
        "error": error,
        "warnings": [str(warning.message) for warning in caught],
        "logged": sorted(trainer.callback_metrics),
        "history": [record for callback in callbacks for record in callback.history],
        "end": None if error else end_of_training(trainer, module),
    }


for where in NAN_AT:
    for choice in ("raise", "warn"):
        SCENARIOS[f"NaN in the {where}, {choice}"] = partial(
            nan_on_rank_1, where, lambda choice=choice: lf.FlatnessCallback(summary=False, on_error=choice)
        )
    SCENARIOS[f"NaN in the {where}, without"] = partial(nan_on_rank_1, where, None)


SYNCED = {
    "synced in every epoch": Synced,
    "synced in every step": partial(Synced, on_step=True, on_epoch=True),
}
OWN = DataLoader(TensorDataset(*dataset(22, seed=1).tensors), 4)


def fails_on_rank_1(batch):
    if rank() == 1:
        raise ArithmeticError("of rank 1")
    return batch


# With 20 samples, all samples have been measured before the last batch, but for the spread the ranks wait for it.
KINDS_OF_DATA = {
    "val": {},
    "some of val": {"max_samples": 20},
    "own data": {"data": OWN, "batch_fn": fails_on_rank_1},
}

for logs, kind in SYNCED.items():
    for choice in ("raise", "warn"):
        for name, options in KINDS_OF_DATA.items():
            SCENARIOS[f"{name}, {logs}, {choice}"] = partial(
                nan_on_rank_1,
                "first batch",
                lambda choice=choice, options=options: lf.FlatnessCallback(summary=False, on_error=choice, **options),
                kind,
            )


class FailsOnRank1(Classifier):
    """The user's own error, in the second validation."""

    def validation_step(self, batch, batch_idx):
        if rank() == 1 and self.current_epoch == 1 and batch_idx == 1:
            self.fail()
        super().validation_step(batch, batch_idx)

    def fail(self):
        raise ArithmeticError("the user's own error")


class DiesOnRank1(FailsOnRank1):
    def fail(self):
        os._exit(1)


CALLBACKS = {
    "without": list,
    "val": lambda: [lf.FlatnessCallback(summary=False)],
    "train": lambda: [lf.FlatnessCallback(summary=False, data="train")],
}


def fit(module_class, with_):
    trainer = trainer_on_ranks(*CALLBACKS[with_](), seconds=10, max_epochs=3)
    trainer.fit(module_class(), DataLoader(dataset(32), 4), DataLoader(dataset(22, seed=1), 4))


for with_ in CALLBACKS:
    SCENARIOS[f"user's error, {with_}"] = partial(fit, FailsOnRank1, with_)
    SCENARIOS[f"death, {with_}"] = partial(fit, DiesOnRank1, with_)
