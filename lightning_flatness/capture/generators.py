"""Random generators that a data set or a model keeps as its own attributes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Longer sequences are data, not transforms.
MOST_PARTS = 100


@contextmanager
def generators_kept(owner: Any) -> Iterator[None]:
    """Restore the states of generators that an object holds on leaving, those of the objects it holds too.

    Found are generators of torch, numpy and Python in attributes, and in short lists, tuples and mappings there; of a
    module, in those of all its modules. A Lightning ``Trainer`` is passed over.

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


def _generators(root: Any) -> list[Any]:
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, (str, bytes, type, Tensor)):
            continue
        seen.add(id(part))
        if isinstance(part, kinds):
            found.append(part)
        elif isinstance(part, nn.Module):
            for module in part.modules():
                seen.add(id(module))
                waiting += vars(module).values()
        elif isinstance(part, dict):
            waiting += list(part.values()) if len(part) <= MOST_PARTS else []
        elif isinstance(part, (list, tuple)):
            waiting += part if len(part) <= MOST_PARTS else []
        elif type(part).__name__ != "Trainer":
            waiting += getattr(part, "__dict__", {}).values()
    return found
