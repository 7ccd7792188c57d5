"""Runs with the callbacks that measure at the end of epochs."""

from functools import partial

import pytest
import torch

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer

KINDS = {
    "spectrum": partial(lf.SpectrumCallback, top_k=1, num_steps=3, num_probes=2, max_products=3),
    "landscape": partial(lf.LandscapeCallback, steps=3, batch_norm="both"),
}
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
