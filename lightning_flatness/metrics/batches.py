"""Batches as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_flatness.errors import BatchError


def batches_on(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with their tensors on the model's device.

    Example:
        >>> next(batches_on(nn.Linear(2, 1), [torch.zeros(3, 2)])).device.type
        'cpu'
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    for batch in batches:
        yield apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """``(inputs, targets)`` of a batch: a pair as it is, a lone tensor as inputs without targets.

    Raises:
        BatchError: anything else.

    Example:
        >>> inputs, targets = split_batch(torch.zeros(4, 1))
        >>> targets is None
        True
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and (batch[1] is None or isinstance(batch[1], Tensor)):
        return batch[0], batch[1]
    raise BatchError(
        f"A batch is a {type(batch).__name__}"
        + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        + "; expected (inputs, targets) with a tensor of targets, or a tensor of inputs. Reshape it, or give the "
        "callback batch_fn=, a function from a batch to (inputs, targets)."
    )
