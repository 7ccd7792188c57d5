"""Conditions on tensors that decide whether a result may be used: looked at one by one, or all together at the end.

Whoever looks at a number waits for the device that computes it. In somebody else's validation that should happen once a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_pending: ContextVar[list[Tensor] | None] = ContextVar("pending", default=None)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds; within :func:`together` every one is taken to hold for the time being.

    Args:
        condition: a single truth value.

    Example:
        >>> holds(torch.tensor(1.0).isfinite()), holds(torch.tensor(1.0).isnan())
        (True, False)
    """
    pending = _pending.get()
    if pending is None:
        return bool(condition)
    pending.append(condition.reshape(()))
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and entries; the entries as :func:`holds` has it.

    Example:
        >>> zeros = torch.zeros(2)
        >>> same(zeros, zeros), same(zeros, torch.zeros(2)), same(zeros, torch.ones(2)), same(zeros, torch.zeros(3))
        (True, True, False, False)
    """
    return one is other or (one.shape == other.shape and holds((one == other).all()))


@contextmanager
def together() -> Iterator[Callable[[], bool]]:
    """Look at no condition meanwhile; yields a function that looks at all, once.

    What was computed counts only if that returns true: it was computed as if every condition held.

    Example:
        >>> with together() as all_hold:
        ...     taken = holds(torch.tensor(True)), holds(torch.tensor(False))
        >>> taken, all_hold()
        ((True, True), False)
    """
    pending: list[Tensor] = []
    token = _pending.set(pending)
    try:
        yield lambda: not pending or bool(torch.stack(pending).all())
    finally:
        _pending.reset(token)
