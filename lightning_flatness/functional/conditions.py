"""Checks of tensors that decide whether a result may be used: evaluated one by one, or deferred and evaluated together.

Evaluating waits for the device. In the user's validation that should happen once for the twelve checks of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_pending: ContextVar[list[Tensor] | None] = ContextVar("pending", default=None)


def holds(condition: Tensor) -> bool:
    """Whether a condition, a single truth value, holds; within :func:`deferred_checks` this is assumed at first."""
    pending = _pending.get()
    if pending is None:
        return bool(condition)
    pending.append(condition.reshape(()))
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and entries; the entries are a check, see :func:`holds`."""
    return one is other or (one.shape == other.shape and holds((one == other).all()))


@contextmanager
def deferred_checks() -> Iterator[Callable[[], bool]]:
    """Defer checks; the yielded function evaluates them together.

    What was computed meanwhile counts only if it returns True.

    Example:
        >>> with deferred_checks() as all_hold:
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
