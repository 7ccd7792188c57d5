"""The scenarios by name, and what they share: each runs on every rank, and returns plain values and tensors."""

import os
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from tests.callbacks.lightning_modules import quiet_trainer

SCENARIOS = {}
# A plain fork at the moment in which a thread of Gloo takes Python's lock stays locked for ever (CPython 3.11).
# Workers are forked from a process without threads, which has imported what they need.
ONE_WORKER = {"num_workers": 1, "multiprocessing_context": "forkserver"}
set_forkserver_preload(["lightning_flatness", "tests.callbacks.lightning_modules"])


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
