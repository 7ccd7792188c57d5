"""Share values, sums and errors between the processes (ranks) of ``torch.distributed``.

All functions except :func:`own_rank` are collectives: call them on every rank or on none. If one rank raised an error
alone, the others would wait for it. So an error is kept until the next collective, which raises it on all ranks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lightning_flatness.errors import BatchError, in_one_line

Value = TypeVar("Value")


def own_rank() -> int:
    """Return the rank of this process; 0 without ``torch.distributed``."""
    return distributed.get_rank() if _is_distributed() else 0


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, ordered by rank. They are pickled, so they should be small."""
    if not _is_distributed():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def failed_ranks(error: Exception | str | None) -> dict[int, str]:
    """Return the error messages of all ranks that failed, by rank. ``error`` is this rank's error or message."""
    messages = gather(in_one_line(error) if isinstance(error, Exception) else error)
    return {rank: message for rank, message in enumerate(messages) if message is not None}


def raise_on_all(error: Exception | None) -> None:
    """Raise an error on all ranks if any rank failed: its own error on that rank, a ``BatchError`` on the others."""
    failed = failed_ranks(error)
    if error is not None:
        raise error
    for rank, message in failed.items():
        raise BatchError(f"Rank {rank} failed: {message}")


def sum_over_ranks(tensor: Tensor, error: Exception | None) -> Tensor:
    """Return the sum over all ranks of a tensor ``(n,)``, on a device that the process group supports.

    If a rank has an error, :func:`raise_on_all` raises it on all ranks.
    """
    if not _is_distributed():
        raise_on_all(error)
        return tensor
    total = torch.cat([tensor, tensor.new_full((1,), float(error is not None))])
    distributed.all_reduce(total)
    if float(total[-1]):  # messages are gathered only after a failure
        raise_on_all(error)
    return total[:-1]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
