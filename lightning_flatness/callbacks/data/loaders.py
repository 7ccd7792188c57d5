"""Find out properties of a data loader without iterating over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import Trainer


def flat_loaders(loaders: Any) -> list[Any]:
    """Return all loaders in a nested list or dict as a flat list. A single loader becomes a list of one."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for part in loaders for loader in flat_loaders(part)]
    return [] if loaders is None else [loaders]


def loaders_in_turn(trainer: Trainer, loaders: Any) -> list[Any]:
    """Return the loaders as a flat list if Lightning iterates over one after the other.

    If Lightning combines the loaders, so that a step gets batches of several loaders at once, return an empty list.
    """
    # Lightning has no public name for the combined loader.
    combined = getattr(getattr(trainer, "_evaluation_loop", None), "_combined_loader", None)
    return flat_loaders(loaders) if getattr(combined, "_mode", "sequential") == "sequential" else []


def is_indexed(loader: Any) -> bool:
    """Return whether a loader is a ``DataLoader`` that reads single samples of its data set by their index."""
    dataset = getattr(loader, "dataset", None)
    has_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    in_bulk = getattr(loader, "batch_sampler", None) is None and isinstance(sampler_of(loader), BatchSampler)
    return isinstance(loader, DataLoader) and has_index and not isinstance(dataset, IterableDataset) and not in_bulk


def sampler_of(loader: Any) -> Any:
    """Return the sampler of a loader, or the sampler inside its batch sampler; None if there is no sampler."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batches is None else getattr(batches, "sampler", None)


def batch_size_of(loader: Any) -> int | None:
    """Return the batch size, or None if the size is unknown or every item of the data set is a batch already."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def keeps_order(loader: Any) -> bool:
    """Return whether the loader fills its batches in the order in which its sampler yields the samples."""
    return getattr(loader, "batch_sampler", None) is None or type(loader.batch_sampler) is BatchSampler


def reads_in_order(loader: Any) -> bool:
    """Return whether the loader reads the samples in the order of the data set.

    With a ``DistributedSampler``, return whether the ranks together read the samples in this order, one sample each in
    turn.
    """
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):  # Lightning's subclass may wrap a sampler, not the data set
        return keeps_order(loader) and not sampler.shuffle and sampler.dataset is loader.dataset
    return keeps_order(loader) and isinstance(sampler, SequentialSampler)


def described(loader: Any) -> str:
    """Return the class names of a loader and its data set, for messages."""
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" over a {type(dataset).__name__}" if dataset is not None else "")


def validated_loaders(trainer: Trainer) -> tuple[Any, Sequence[int | float]]:
    """Return the loaders that Lightning validates or tests now, and how many batches of each loader it runs."""
    if trainer.testing:
        return trainer.test_dataloaders, trainer.num_test_batches
    return trainer.val_dataloaders, trainer.num_val_batches
