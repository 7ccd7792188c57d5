"""Check conditions on tensors, one at a time or all together, to decide whether a result may be used.

To read a condition, the program has to wait for the GPU. A batch that is measured during the user's validation has
about twelve conditions. These are deferred and read together, so that the program waits only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_pending: ContextVar[list[Tensor] | None] = ContextVar("pending", default=None)


def holds(condition: Tensor) -> bool:
    """Return whether a condition is true; inside :func:`deferred_checks`, return True and defer the check."""
    pending = _pending.get()
    if pending is None:
        return bool(condition)
    pending.append(condition.reshape(()))
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal shapes and entries; :func:`holds` may defer the check of the entries."""
    return one is other or (one.shape == other.shape and holds((one == other).all()))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal shapes and entries, where NaN equals NaN.

    Example:
        >>> same_values(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
        True
    """
    if torch.equal(one, other):
        return True
    is_alike = one.is_floating_point() and one.shape == other.shape
    return is_alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@contextmanager
def deferred_checks() -> Iterator[Callable[[], bool]]:
    """Defer the checks of :func:`holds` in a ``with`` block, and yield a function that reads all conditions together.

    The function returns whether all conditions are true. Use results that were computed inside the block only if it
    returns True.

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
