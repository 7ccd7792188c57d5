"""Choose a fixed random subset of samples, stratified by class if the labels are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def choose(total: int, chosen: int, labels: Tensor | None = None) -> Tensor:
    """Choose ``chosen`` of ``total`` samples at random, and return their sorted indices.

    Every call chooses the same samples. If ``chosen`` is at least ``total``, return all indices. With ``labels``, a
    tensor ``(total,)``, the number of chosen samples of a class is proportional to the size of the class, rounded up or
    down.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    if chosen >= total:
        return order.sort().values
    if labels is None:
        return order[:chosen].sort().values
    # by_class is sorted by class and shuffled within a class, so a choice at even distances is stratified.
    by_class = order[labels[order].argsort(stable=True)]
    spaced = (2 * torch.arange(chosen, device="cpu") + 1) * total // (2 * chosen)
    return by_class[spaced].sort().values


def labels_of(dataset: Any) -> Tensor | None:
    """Return the class of every sample, ``(samples,)``, or None if the data set does not hold all labels in memory.

    This function reads no sample. It knows data sets with an attribute ``targets`` or ``labels`` (as in torchvision),
    ``TensorDataset``, and a ``Subset`` or ``ConcatDataset`` of these.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.long, device="cpu")
        return None if labels is None else labels[indices]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _as_classes(dataset.tensors[-1], len(dataset))
    found = (_as_classes(getattr(dataset, name, None), len(dataset)) for name in ("targets", "labels"))
    return next((labels for labels in found if labels is not None), None)


def _as_classes(values: Any, total: int) -> Tensor | None:
    """Return the values as a ``(total,)`` integer tensor, or None if they are not ``total`` integers."""
    if values is None or not hasattr(values, "__len__"):
        return None
    try:
        labels = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = not labels.is_floating_point() and not labels.is_complex()
    return labels.cpu().long() if is_whole and labels.shape == (total,) else None
