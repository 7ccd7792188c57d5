"""Keep the numbers that data sets, samplers and collate functions change in themselves while they are read."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from lightning_flatness.model.generators import parts_of

PLAIN = (bool, int, float, str)
MOST_LOOKED_AT = 64  # entries of a list or array that are compared


class OwnCounters:
    """Gives a reader of its own the counters of a data set, so that those of the user's reader stay as they are.

    A counter is an attribute that is a number, string or boolean, of any object that ``owner`` holds. In an object
    whose other attributes change as well, it may belong to a cache or an open file. Such an object is left as it is.

    Example:
        >>> from types import SimpleNamespace
        >>> data = SimpleNamespace(number=3)
        >>> counters = OwnCounters(data)
        >>> for _ in range(2):
        ...     with counters.used():
        ...         data.number += 1
        ...         print(data.number)
        4
        5
        >>> data.number
        3
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        # By the ids of objects: the object, which keeps its id from being used again, and its counters.
        self._own: dict[int, tuple[Any, dict[str, Any]]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block, the counters have the values that they had at the end of the block before."""
        parts = [part for part in parts_of(self._owner) if _is_searched(part)]
        before = [(part, _counters(part), _others(part)) for part in parts]
        for part, _, _ in before:
            vars(part).update(self._own.get(id(part), (part, {}))[1])
        try:
            yield
        finally:
            for part, user, others in before:
                own = _counters(part)
                if own != user and _others(part) == others:
                    self._own[id(part)] = part, own
                    for name in own.keys() - user.keys():  # until it was read, the object had the value of its class
                        del vars(part)[name]
                    vars(part).update(user)


def _is_searched(part: Any) -> bool:
    """Return whether an object may have counters, but has no open file, whose position would not be put back."""
    attributes = None if isinstance(part, ModuleType) else getattr(part, "__dict__", None)
    return type(attributes) is dict and not any(hasattr(type(value), "seek") for value in attributes.values())


def _counters(part: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if type(value) in PLAIN}


def _others(part: Any) -> list[Any]:
    """Return what tells whether the other attributes of an object have changed, also in place."""
    return [(name, id(value), _content(value)) for name, value in vars(part).items() if type(value) not in PLAIN]


def _content(value: Any) -> Any:
    """Return what most likely differs after a tensor, array, list or dictionary has changed in place."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):  # the version of an inference tensor cannot be read
        return None if value.is_inference() else value._version
    if numpy is not None and isinstance(value, numpy.ndarray):
        return value.flat[:: _step(value.size)].tobytes()
    if isinstance(value, dict):
        return len(value), id(next(reversed(value), None))
    if isinstance(value, (list, deque)):
        return len(value), [id(value[index]) for index in range(0, len(value), _step(len(value)))]
    return len(value) if isinstance(value, set) else None


def _step(length: int) -> int:
    return max(1, length // MOST_LOOKED_AT)
