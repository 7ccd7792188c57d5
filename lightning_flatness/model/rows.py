"""Samples of a batch: their number, some of them, one of them twice."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def num_rows(inputs: Any, targets: Tensor | None = None) -> int:
    """Number of samples of a batch: the length of its targets, or the largest first dimension of its tensors."""
    if targets is not None and targets.ndim and not isinstance(inputs, Tensor):
        return targets.shape[0]
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.ndim else 1))
    return max(sizes, default=1)


def take(batch: Any, rows: slice, num_samples: int) -> Any:
    """Some samples of a batch; tensors without a row for every sample stay whole.

    Example:
        >>> import torch
        >>> take({"image": torch.zeros(5, 3), "scale": torch.ones(1)}, slice(0, 2), 5)["image"].shape
        torch.Size([2, 3])
    """

    def of_samples(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.ndim and tensor.shape[0] == num_samples else tensor

    return apply_to_collection(batch, Tensor, of_samples)


def twice(batch: Any) -> Any:
    """A batch that has its one sample twice."""
    return apply_to_collection(batch, Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor)
