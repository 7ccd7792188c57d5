"""What the processes of a distributed run tell each other, beside the sums of the metrics."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import distributed

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
