"""What loaders read, and reading the same without a trace on them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer
from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.generators import drawing, generators_kept
from lightning_flatness.model.isolation import random_states_kept

# ---------------------------------------------------------------------------------------------------- what a loader is


def flat_loaders(loaders: Any) -> list[Any]:
    """One loader, or a list or dict of them, as a list.

    Example:
        >>> flat_loaders({"one": 1, "others": [2, 3]})
        [1, 2, 3]
    """
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for part in loaders for loader in flat_loaders(part)]
    return [] if loaders is None else [loaders]


def loaders_in_turn(trainer: Trainer, loaders: Any) -> list[Any]:
    """The loaders whose batches come one after the other; none if Lightning combines them into batches of its own."""
    # Lightning has no public name for this.
    combined = getattr(getattr(trainer, "_evaluation_loop", None), "_combined_loader", None)
    return flat_loaders(loaders) if getattr(combined, "_mode", "sequential") == "sequential" else []


def is_indexed(loader: Any) -> bool:
    """Whether it is a ``DataLoader`` over a data set that can be read at any index, without an iterator's state.

    Example:
        >>> is_indexed(DataLoader([1, 2])), is_indexed([1, 2])
        (True, False)
    """
    dataset = getattr(loader, "dataset", None)
    has_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    in_bulk = getattr(loader, "batch_sampler", None) is None and isinstance(sampler_of(loader), BatchSampler)
    return isinstance(loader, DataLoader) and has_index and not isinstance(dataset, IterableDataset) and not in_bulk


def sampler_of(loader: Any) -> Any:
    """The sampler of a loader, or the one in its batch sampler; None in a batch sampler that has none.

    Example:
        >>> type(sampler_of(DataLoader([1, 2, 3]))).__name__
        'SequentialSampler'
    """
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batches is None else getattr(batches, "sampler", None)


def batch_size_of(loader: Any) -> int | None:
    """Samples of a batch; None where every item of the data set is a batch, or a batch sampler does not say.

    Example:
        >>> batch_size_of(DataLoader([1, 2, 3], batch_sampler=BatchSampler(range(3), 2, False)))
        2
    """
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def keeps_order(loader: Any) -> bool:
    """Whether batches are what the sampler gives, one after the other.

    Example:
        >>> keeps_order(DataLoader([1, 2, 3], batch_sampler=[[0, 2], [1]]))
        False
    """
    return getattr(loader, "batch_sampler", None) is None or type(loader.batch_sampler) is BatchSampler


def reads_in_order(loader: Any) -> bool:
    """Whether the samples come in the order of the data set, on several ranks together too.

    Example:
        >>> reads_in_order(DataLoader([1, 2, 3])), reads_in_order(DataLoader([1, 2, 3], shuffle=True))
        (True, False)
    """
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):  # Lightning's own may have another sampler in place of a data set
        return keeps_order(loader) and not sampler.shuffle and sampler.dataset is loader.dataset
    return keeps_order(loader) and isinstance(sampler, SequentialSampler)


def described(loader: Any) -> str:
    """What a loader is, for messages.

    Example:
        >>> described([1, 2])
        'list'
    """
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" over a {type(dataset).__name__}" if dataset is not None else "")


# ---------------------------------------------------------------------------------------------- reading without a trace


def own_loader(loader: Any, indices: Sequence[int] | None = None) -> DataLoader[Any]:
    """A loader over the user's data set, which shares no iterator, worker or generator with theirs.

    Args:
        loader: the user's.
        indices: of the samples that it reads, in this order; None for a stream.
    """
    # A batch sampler that does not say its size still gives batches.
    size = batch_size_of(loader) or (64 if getattr(loader, "batch_sampler", None) is not None else None)
    return DataLoader(
        loader.dataset if indices is None else Subset(loader.dataset, indices),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers if indices is None else min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        drop_last=indices is None and size is not None and loader.drop_last,
        generator=torch.Generator(),  # an iterator draws its base seed here, not from the global generator
    )


def repeatable_batches(loader: DataLoader[Any], model: nn.Module) -> Iterator[Any]:
    """The batches of a loader of our own, with the same random numbers every time; random states are kept.

    Raises:
        FlatnessError: the data set cannot be read so.
    """
    batches = batches_apart(loader, model)
    while True:
        try:
            batch = next(batches, batches)
        except Exception as error:
            raise FlatnessError(
                f"There is a {type(error).__name__}: {error} where the data set is asked for samples by "
                "their number. Use data='val', or data= with a loader or batches of your own."
            ) from error
        if batch is batches:
            return
        yield batch


def batches_apart(batches: Any, model: nn.Module) -> Iterator[Any]:
    """The batches of an iterable, with the same random numbers every time; random states are kept.

    Args:
        batches: anything that can be iterated.
        model: tells on which devices there are random states.
    """
    iterator: Iterator[Any] | None = None
    for index in count():
        with random_states_kept(model), generators_kept(drawing(batches)):
            _seed(index)
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, iterator)
        if batch is iterator:
            return
        yield batch


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def first_batch(loaders: Sequence[Any], model: nn.Module) -> Any | None:
    """The first batch of the data set of the first loader, without touching that loader.

    None where it cannot be told what that loader would read.
    """
    loader = next(iter(loaders), None)
    known = (SequentialSampler, RandomSampler, DistributedSampler)
    if not is_indexed(loader) or not keeps_order(loader) or type(sampler_of(loader)) not in known:
        return None
    indices = list(range(min(batch_size_of(loader) or 1, len(cast(Any, loader).dataset))))
    try:
        return next(repeatable_batches(own_loader(loader, indices), model), None)
    except FlatnessError:
        return None


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Do to a batch what the Trainer's loops do, precision and transfer hooks included, with the same random numbers.

    Those of the CPU, that is; hooks that draw on an accelerator draw others every time.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    with random_states_kept(pl_module):
        _seed(0)
        # The public name would pass over a DataModule's hook.
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
