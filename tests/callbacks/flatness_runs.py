"""Runs with a FlatnessCallback, and what they log."""

import copy

from lightning.pytorch.callbacks import Callback
from torch.utils.data import IterableDataset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer

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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(16))
