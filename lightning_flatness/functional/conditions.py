"""Conditions on tensors that decide whether a result may be used, evaluated one by one or all together.

Evaluating a condition waits for the GPU. A batch of the user's validation has about twelve conditions, so they are
deferred and evaluated together: the program then waits once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_pending: ContextVar[list[Tensor] | None] = ContextVar("pending", default=None)


def holds(condition: Tensor) -> bool:
    """Return a condition as a ``bool``; within :func:`deferred_checks` return True and evaluate it later."""
    pending = _pending.get()
    if pending is None:
        return bool(condition)
    pending.append(condition.reshape(()))
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and entries; the entries are compared by :func:`holds`."""
    return one is other or (one.shape == other.shape and holds((one == other).all()))


@contextmanager
def deferred_checks() -> Iterator[Callable[[], bool]]:
    """Defer the conditions given to :func:`holds`, and yield a function that evaluates all of them together.

    Results computed inside the block may be used only if this function returns True.

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
