"""Random generators that a data set or a model keeps as its own attributes."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

# Longer sequences are data, not transforms.
MOST_PARTS = 100
DEEPEST = 8
PLAIN = frozenset([bool, int, float, str, bytes, type(None), Tensor, nn.Parameter])
MAPPINGS = frozenset([dict, OrderedDict])
OTHERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


@contextmanager
def generators_kept(owner: Any) -> Iterator[None]:
    """Restore the states of generators that an object holds on leaving, those of the objects it holds too.

    Found are generators of torch, numpy and Python in attributes, and in short lists, tuples and mappings there; of a
    module, in those of all its modules.

    Example:
        >>> from types import SimpleNamespace
        >>> data = SimpleNamespace(transform=[random.Random(0)])
        >>> with generators_kept(data):
        ...     inside = data.transform[0].random()
        >>> data.transform[0].random() == inside
        True
    """
    restore = [restoring(generator) for generator in _generators(owner)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def drawing(batches: Any) -> list[Any]:
    """The parts of a loader that may hold generators, for :func:`generators_kept`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> generator = torch.Generator()
        >>> any(part is generator for part in drawing(DataLoader([1, 2], shuffle=True, generator=generator)))
        True
    """
    parts = [batches, *(getattr(batches, name, None) for name in ("dataset", "generator", "sampler", "batch_sampler"))]
    return parts + [getattr(part, "generator", None) for part in parts]


def restoring(generator: Any) -> Callable[[], Any]:
    """A function that puts a generator into the state in which it is now."""
    if isinstance(generator, torch.Generator):
        state: Any = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        state = generator.getstate()
        return lambda: generator.setstate(state)
    if hasattr(generator, "bit_generator"):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    state = generator.get_state()
    return lambda: generator.set_state(state)


def _generators(owner: Any) -> list[Any]:
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [(owner, 0)]
    while waiting:
        part, depth = waiting.pop()
        # Most of what a module has are flags and empty mappings of hooks; a measurement comes here for every part.
        if type(part) in PLAIN or (type(part) in MAPPINGS and not part) or id(part) in seen or depth > DEEPEST:
            continue
        seen.add(id(part))
        if isinstance(part, kinds) and not isinstance(part, random.SystemRandom):  # which has no state
            found.append(part)
        else:
            waiting += [(inner, depth + 1) for inner in _parts(part)]
    return found


def _parts(part: Any) -> list[Any]:
    """What an object holds, if it is of a kind that may hold generators: not the inside of Python's and torch's own."""
    if isinstance(part, nn.Module):
        modules = list(part.modules()) if not isinstance(part, torch.jit.ScriptModule) else []
        return [value for module in modules for value in vars(module).values()]
    if isinstance(part, dict):
        return list(part.values()) if len(part) <= MOST_PARTS else []
    if isinstance(part, (list, tuple)):
        return list(part) if len(part) <= MOST_PARTS else []
    if isinstance(part, (type, ModuleType, Tensor)):
        return []
    root = type(part).__module__.partition(".")[0]
    if root in OTHERS or (root in sys.stdlib_module_names and not isinstance(part, SimpleNamespace)):
        return list(vars(part).values()) if isinstance(part, Dataset) else []
    return list(getattr(part, "__dict__", {}).values())
