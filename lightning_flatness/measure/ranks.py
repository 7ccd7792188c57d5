"""Share values, sums and errors between the processes (ranks) of ``torch.distributed``.

With ``sync`` these functions are collectives: call them on every rank or on none. If one rank raised an error alone,
the others would wait for that rank forever. So a rank can pass its error to the next collective, which raises an error
on all ranks. Without ``sync`` this process counts as the only rank, and nothing communicates.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lightning_flatness.errors import BatchError, in_one_line

Value = TypeVar("Value")


def own_rank(sync: bool) -> int:
    """Return the rank of this process; 0 without ``sync`` or without a process group."""
    return distributed.get_rank() if _together(sync) else 0


def num_ranks(sync: bool) -> int:
    """Return the number of processes that measure together; 1 without ``sync`` or without a process group."""
    return distributed.get_world_size() if _together(sync) else 1


def gather(value: Value, sync: bool) -> list[Value]:
    """Return the values of all ranks, ordered by rank. Values should be small, because they are pickled."""
    if not _together(sync):
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def failed_ranks(error: Exception | None, sync: bool) -> dict[int, str]:
    """Return a mapping from the ranks that failed to their error messages.

    ``error`` is the error of this rank, or None if this rank did not fail.
    """
    messages = gather(None if error is None else in_one_line(error), sync)
    return {rank: message for rank, message in enumerate(messages) if message is not None}


def raise_on_all(error: Exception | None, sync: bool) -> None:
    """Raise an error on all ranks if any rank failed; ``error`` is this rank's error, or None.

    A rank that failed raises its own error. The other ranks raise a :class:`BatchError` with the message of a failed
    rank.
    """
    failed = failed_ranks(error, sync)
    if error is not None:
        raise error
    for rank, message in failed.items():
        raise BatchError(f"Rank {rank} failed: {message}")


def sum_over_ranks(tensor: Tensor, error: Exception | None, sync: bool) -> Tensor:
    """Return the sum of a tensor ``(n,)`` over all ranks, or raise an error on all ranks if one has an ``error``.

    The tensor must be on a device that the process group supports.
    """
    if not _together(sync):
        raise_on_all(error, sync)
        return tensor
    total = torch.cat([tensor, tensor.new_full((1,), float(error is not None))])
    distributed.all_reduce(total)
    if float(total[-1]):  # messages are gathered only after a failure
        raise_on_all(error, sync)
    return total[:-1]


def _together(sync: bool) -> bool:
    """Return whether the functions of this file communicate, which needs both ``sync`` and a process group."""
    return sync and distributed.is_available() and distributed.is_initialized()
