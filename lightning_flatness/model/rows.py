"""Count, select and duplicate the samples of a batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def num_rows(inputs: Any, targets: Tensor | None = None) -> int:
    """Return the number of samples: the length of the targets, or the largest first dimension of the inputs."""
    if targets is not None and targets.ndim and not isinstance(inputs, Tensor):
        return targets.shape[0]
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.ndim else 1))
    return max(sizes, default=1)


def take(batch: Any, rows: slice, num_samples: int) -> Any:
    """Return some samples of a batch; a tensor without one row per sample is returned whole.

    Example:
        >>> import torch
        >>> take({"image": torch.zeros(5, 3), "scale": torch.ones(1)}, slice(0, 2), 5)["image"].shape
        torch.Size([2, 3])
    """

    def of_samples(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.ndim and tensor.shape[0] == num_samples else tensor

    return apply_to_collection(batch, Tensor, of_samples)


def twice(batch: Any) -> Any:
    """Return a batch of one sample with this sample duplicated."""
    return apply_to_collection(batch, Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor)
