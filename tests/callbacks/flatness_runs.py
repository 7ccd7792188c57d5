"""Runs with a FlatnessCallback, and what they log."""

import copy
import warnings
from contextlib import contextmanager

from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close
from torch.utils.data import IterableDataset

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, end_of, seed_all
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


def seeded_fit(folder, *callbacks, **options):
    """Runs alike, but for what callbacks do."""
    seed_all()
    return fit(folder, *callbacks, **({"max_epochs": 4} | options))


def run_without_a_trace(folder, make, callback, data=None, **options):
    """The module after a run with the callback, which ends as one without it."""
    module, bare = make(), make()
    end = end_of(seeded_fit(folder, callback, module=module, data=data, **options), module)
    assert_same(end, end_of(seeded_fit(folder, module=bare, **options), bare))
    return module


def assert_reports_equal(found, expected, prefix="net.", rtol=1e-5):
    assert list(found.layers) == [prefix + name for name in expected.layers]
    for name, layer in expected.layers.items():
        one = found.layers[prefix + name]
        scale = abs(layer.hessian_trace) + abs(layer.relative_flatness)
        for measure in ("hessian_trace", "relative_flatness", "weight_norm"):
            assert_close(getattr(one, measure), getattr(layer, measure), rtol=rtol, atol=rtol * scale)
        assert one.exact == layer.exact


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(16))


@contextmanager
def warnings_of(*words):
    """The messages of warnings that contain one of the words."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if any(word in str(one.message) for word in words)]
