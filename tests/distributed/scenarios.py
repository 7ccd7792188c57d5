"""The scenarios by name, and what they share: each runs on every rank, and returns plain values and tensors."""

import os
from datetime import timedelta
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from tests.callbacks.lightning_modules import quiet_trainer

SCENARIOS = {}


def scenario(function):
    """Register a function by its name."""
    SCENARIOS[function.__name__] = function
    return function


def rank():
    return int(os.environ["RANK"])


def trainer_on_ranks(*callbacks, seconds=20, **options):
    """A quiet Trainer over all ranks; one that is left alone ends with an error after some seconds."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    strategy = (
        DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=seconds)) if num_ranks > 1 else "auto"
    )
    return quiet_trainer(Path.cwd(), *callbacks, devices=num_ranks, strategy=strategy, **options)
