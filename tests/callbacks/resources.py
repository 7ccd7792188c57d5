"""What a process holds: memory, files, threads, tensors, objects, figures, hooks."""

import ctypes
import gc
import os
import sys
import threading
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from tests.callbacks.compare import num_hooks

PROC = Path("/proc/self")

# By how much a run may grow from epoch 50 to epoch 200. The history grows by a record an epoch: a dict, ten numbers.
BOUNDS = {"megabytes": 12.0, "files": 0, "threads": 0, "tensors": 0, "objects": 2000, "figures": 0, "hooks": 0}


def give_back_freed_pages():
    """Where the C library is glibc, whose heap keeps some of what has been freed, more or less as it happens to lie."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def resources(model):
    """What this process holds, by kind."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance() asks deprecated module attributes, too
        objects = gc.get_objects()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    found = {
        "threads": threading.active_count(),
        "tensors": tensors,
        "objects": len(objects),
        "hooks": num_hooks(model),
    }
    if "matplotlib.pyplot" in sys.modules:
        found["figures"] = len(sys.modules["matplotlib.pyplot"].get_fignums())
    if PROC.exists():
        give_back_freed_pages()
        pages = int((PROC / "statm").read_text().split()[1])
        found["megabytes"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        found["files"] = len(os.listdir(PROC / "fd"))
    return found


def growth(before, after):
    """What grew beyond its bound, and by how much."""
    grown = {kind: after[kind] - before.get(kind, 0) for kind in after}
    return {kind: amount for kind, amount in grown.items() if amount > BOUNDS[kind]}


class Watch(Callback):
    """Notes what is held at some epochs."""

    def __init__(self, *epochs):
        self.epochs, self.found = epochs, {}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            self.found[trainer.current_epoch] = resources(pl_module)
