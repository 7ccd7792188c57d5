"""A fixed random choice of samples, with every class in its share where labels are at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def choose(total: int, chosen: int, labels: Tensor | None = None) -> Tensor:
    """Indices of some of ``total`` samples, sorted, always the same.

    Args:
        total: how many there are.
        chosen: how many are wanted; all of them if there are not more.
        labels: ``(total,)``; every class gets its share, rounded up or down.

    Example:
        >>> labels = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1])
        >>> labels[choose(8, 4, labels)].tolist().count(0)
        1
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    if chosen >= total:
        return order.sort().values
    if labels is None:
        return order[:chosen].sort().values
    # Sorted by class and shuffled within, evenly spaced samples meet every class in its share.
    by_class = order[labels[order].argsort(stable=True)]
    spaced = (2 * torch.arange(chosen) + 1) * total // (2 * chosen)
    return by_class[spaced].sort().values


def labels_of(dataset: Any) -> Tensor | None:
    """Class of every sample, if the data set keeps them in memory; none is read for it.

    Known are ``targets`` and ``labels``, as torchvision's data sets have, ``TensorDataset``, and ``Subset`` and
    ``ConcatDataset`` of these.

    Example:
        >>> labels_of(Subset(TensorDataset(torch.zeros(3, 1), torch.tensor([5, 6, 7])), [2, 0]))
        tensor([7, 5])
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _classes(dataset.tensors[-1], len(dataset))
    for name in ("targets", "labels"):
        labels = _classes(getattr(dataset, name, None), len(dataset))
        if labels is not None:
            return labels
    return None


def _classes(values: Any, total: int) -> Tensor | None:
    """As a tensor of whole numbers, if they are that, one for every sample."""
    if values is None or not hasattr(values, "__len__"):
        return None
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not labels.is_floating_point() and not labels.is_complex()
    return labels.cpu().long() if whole and labels.shape == (total,) else None
