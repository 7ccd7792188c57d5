"""Put the attributes of modules and other objects back after a block of code."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

# Types of collections that are restored. Those that are derived from them may do anything when they are read.
COLLECTIONS = (list, dict, OrderedDict, defaultdict, Counter, set, deque)
MOST_SEARCHED = 1000  # collections with more entries are restored, but their entries are not searched for others


@contextmanager
def attributes_kept(owners: Iterable[Any], most: float = math.inf) -> Iterator[None]:
    """Replace tensors among the attributes of modules or other objects by copies; on leaving, restore all attributes.

    Lists, dictionaries, sets and deques are not replaced, because a hook or another module may hold them, too. On
    leaving, they get their entries back, also those inside others. A module's parameters, buffers, submodules and
    hooks are in such dictionaries. Tensors and collections with more than ``most`` entries are left alone, and so are
    collections of derived types.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> layer.seen = {"batches": []}
        >>> with attributes_kept([layer]):
        ...     layer.seen["batches"].append(1)
        ...     layer.register_buffer("mask", torch.ones(3))
        >>> layer.seen, list(layer.state_dict())
        ({'batches': []}, ['weight', 'bias'])
    """
    objects = list(owners)
    before = [dict(vars(one)) for one in objects]
    collections = _entries_by_collection((value for attributes in before for value in attributes.values()), most)
    try:
        for one, attributes in zip(objects, before, strict=True):
            for name, value in attributes.items():
                if isinstance(value, Tensor) and value.numel() <= most:
                    with torch.inference_mode(value.is_inference()):
                        vars(one)[name] = value.detach().clone()
        yield
    finally:
        for one, attributes in zip(objects, before, strict=True):
            now = vars(one)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
        for collection, entries in collections:
            if collection or entries:  # most tables of hooks are empty
                _restore(collection, entries)


def _entries_by_collection(values: Iterable[Any], most: float) -> list[tuple[Any, list[Any]]]:
    """Return all collections among values and in them, each with a list of its entries; large ones are left out."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    waiting = list(values)
    for value in waiting:  # the list grows while it is walked
        holds_entries = type(value) in COLLECTIONS or isinstance(value, tuple)
        if holds_entries and id(value) not in found and len(value) <= most:
            found[id(value)] = value, (_entries(value) if value else [])
            waiting += found[id(value)][1] if len(value) <= MOST_SEARCHED else ()
    return [pair for pair in found.values() if not isinstance(pair[0], tuple)]


def _entries(collection: Any) -> list[Any]:
    """Return the entries of a collection; of a dictionary the keys, followed by the values."""
    return [*collection, *collection.values()] if isinstance(collection, dict) else list(collection)


def _restore(collection: Any, entries: list[Any]) -> None:
    """Give a collection the entries that :func:`_entries` has returned earlier; do nothing if it has them."""
    now = _entries(collection)
    if len(now) == len(entries) and all(map(is_, now, entries)):
        return
    collection.clear()
    if isinstance(collection, dict):
        half = len(entries) // 2
        for key, value in zip(entries[:half], entries[half:], strict=True):
            collection[key] = value
    elif isinstance(collection, set):
        collection.update(entries)
    else:
        collection.extend(entries)
