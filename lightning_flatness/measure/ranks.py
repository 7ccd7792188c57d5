"""What the processes of a distributed run tell each other, beside the sums of the metrics."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, distributed

Value = TypeVar("Value")


def own_rank() -> int:
    """Of this process; 0 without ``torch.distributed``.

    Example:
        >>> own_rank()
        0
    """
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def gather(value: Value) -> list[Value]:
    """The value of every rank, in order; without ``torch.distributed``, a list of the one.

    A collective: call it on every rank or on none.

    Args:
        value: anything that can be pickled; small.

    Example:
        >>> gather("here")
        ['here']
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; without ``torch.distributed``, the tensor itself.

    A collective: call it on every rank or on none, with the same shape.

    Args:
        tensor: on a device that the process group can take; it may be overwritten.

    Example:
        >>> import torch
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor
