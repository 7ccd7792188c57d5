"""Values, sums and errors that the processes of ``torch.distributed`` share.

All functions but :func:`own_rank` are collectives: call them on every rank or on none. A rank that raised alone would
leave the others waiting, so an error is kept until the next of these calls, which raises it on all ranks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lightning_flatness.errors import BatchError, in_one_line

Value = TypeVar("Value")


def own_rank() -> int:
    """Number of this process; 0 without ``torch.distributed``."""
    return distributed.get_rank() if _is_distributed() else 0


def gather(value: Value) -> list[Value]:
    """The values (small, to be pickled) of all ranks, in order; without ``torch.distributed``, a list of the one."""
    if not _is_distributed():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def failed_ranks(error: Exception | str | None) -> dict[int, str]:
    """Messages of the ranks that have an error, by rank; ``error`` is that of this rank, or its message."""
    messages = gather(in_one_line(error) if isinstance(error, Exception) else error)
    return {rank: message for rank, message in enumerate(messages) if message is not None}


def raise_on_all(error: Exception | None) -> None:
    """Raise an error that any rank has on all ranks: this rank's own as it is, another's as a ``BatchError``."""
    failed = failed_ranks(error)
    if error is not None:
        raise error
    for rank, message in failed.items():
        raise BatchError(f"Rank {rank} failed: {message}")


def sum_over_ranks(tensor: Tensor, error: Exception | None) -> Tensor:
    """The sum over all ranks of a tensor ``(n,)``, on a device that the process group can take.

    If a rank has an error, :func:`raise_on_all` raises it.
    """
    if not _is_distributed():
        raise_on_all(error)
        return tensor
    total = torch.cat([tensor, tensor.new_full((1,), float(error is not None))])
    distributed.all_reduce(total)
    if float(total[-1]):  # the messages are gathered only where there are some
        raise_on_all(error)
    return total[:-1]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
