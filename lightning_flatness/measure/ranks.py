"""Share values, sums and errors between the processes (ranks) of ``torch.distributed``.

With ``sync`` these functions are collectives: call them on every rank or on none. If one rank raised an error alone,
the others would wait for it. So an error is kept until the next collective, which raises it on all ranks. Without
``sync`` this process is the only rank, and nothing communicates.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lightning_flatness.errors import BatchError, in_one_line

Value = TypeVar("Value")


def own_rank(sync: bool) -> int:
    """Return the rank of this process; 0 without ``torch.distributed``, or if this process measures alone."""
    return distributed.get_rank() if _together(sync) else 0


def num_ranks(sync: bool) -> int:
    """Return the number of processes that measure together; 1 without ``sync``."""
    return distributed.get_world_size() if _together(sync) else 1


def gather(value: Value, sync: bool) -> list[Value]:
    """Return the values of all ranks, ordered by rank. They are pickled, so they should be small."""
    if not _together(sync):
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def failed_ranks(error: Exception | str | None, sync: bool) -> dict[int, str]:
    """Return the error messages of all ranks that failed, by rank. ``error`` is this rank's error or message."""
    messages = gather(in_one_line(error) if isinstance(error, Exception) else error, sync)
    return {rank: message for rank, message in enumerate(messages) if message is not None}


def raise_on_all(error: Exception | None, sync: bool) -> None:
    """Raise an error on all ranks if any rank failed: its own error on that rank, a ``BatchError`` on the others."""
    failed = failed_ranks(error, sync)
    if error is not None:
        raise error
    for rank, message in failed.items():
        raise BatchError(f"Rank {rank} failed: {message}")


def sum_over_ranks(tensor: Tensor, error: Exception | None, sync: bool) -> Tensor:
    """Return the sum over all ranks of a tensor ``(n,)``, on a device that the process group supports.

    If a rank has an error, :func:`raise_on_all` raises it on all ranks.
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
    return sync and distributed.is_available() and distributed.is_initialized()
