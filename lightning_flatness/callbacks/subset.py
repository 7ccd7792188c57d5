"""A fixed part of some data, read without a trace on the user's loader."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
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

from lightning_flatness.callbacks.root import LightningModule, Trainer
from lightning_flatness.callbacks.strata import choose, labels_of
from lightning_flatness.capture import generators_kept, random_states_kept
from lightning_flatness.errors import FlatnessError

DEFAULT_TRAINING_SAMPLES = 4096


class FixedSubset:
    """The same samples in every epoch, of training data or of any other, read apart from the user's iteration.

    A ``DataLoader`` over a data set with an index is read for its settings and never iterated. Samples pass the data
    set's own transforms and the loader's own ``collate_fn``; random transforms draw the same numbers in every epoch. If
    the loader has workers, the subset is read by one worker of its own, else in the main process with random states
    kept, those of the data set's own generators too.
    Any other iterable of batches is iterated as it is, with random states kept.

    Args:
        loader: a ``DataLoader``, or an iterable of batches that can be iterated again and again.
        max_samples: size of the subset over all ranks, a random one in which every class has its share; all by default.
        rank: which share of the subset.
        num_ranks: how many shares.
        first: leave out what comes after so many samples.

    Raises:
        FlatnessError: ``max_samples`` of something without an index.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> subset = FixedSubset(DataLoader(data, batch_size=4, shuffle=True), max_samples=6)
        >>> subset.restart(nn.Identity())
        >>> [len(batch[0]) for batch in subset.up_to(0.5)], [len(batch[0]) for batch in subset.up_to(1.0)]
        ([4], [2])
    """

    def __init__(
        self,
        loader: Any,
        max_samples: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        first: float = math.inf,
    ) -> None:
        self._batches: Iterator[Any] = iter(())
        self._given = 0
        self._share = slice(rank, None, num_ranks)
        self._own = is_indexed(loader)
        if not self._own:
            if max_samples is not None:
                raise FlatnessError(
                    "FlatnessCallback(max_samples=...) needs a DataLoader over a data set with __getitem__ and "
                    f"__len__; data= is a {described(loader)}. Give that many samples, or do without max_samples."
                )
            self._loader = loader
            return
        dataset = loader.dataset
        # A sampler may leave samples out for good (SubsetRandomSampler): those are not of the data.
        sampler = sampler_of(loader)
        sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # in Lightning's DistributedSampler
        allowed = torch.tensor(list(getattr(sampler, "indices", range(len(dataset)))), dtype=torch.long)
        allowed = allowed[: int(min(first, len(allowed)))]
        labels = labels_of(dataset)
        total = len(allowed)
        drawn = choose(
            total, total if max_samples is None else max_samples, None if labels is None else labels[allowed]
        )
        self._loader = own_loader(loader, allowed[drawn][self._share].tolist())

    def restart(self, model: nn.Module) -> None:
        """Begin at the first batch; ``model`` tells on which devices random states are kept."""
        self._given = 0
        if self._own:
            self._batches = repeatable_batches(self._loader, model)
        else:
            self._batches = islice(batches_apart(self._loader, model), *self._share.indices(sys.maxsize))

    def up_to(self, fraction: float) -> Iterator[Any]:
        """The next batches, until this fraction of the subset has been given since :meth:`restart`."""
        if fraction < 1 and not self._own:
            return  # of unknown length
        goal = math.ceil(len(self._loader) * fraction) if fraction < 1 else math.inf
        while self._given < goal and (batch := next(self._batches, self)) is not self:
            self._given += 1
            yield batch


def training_subset(
    loader: Any, max_samples: int | None, rank: int, num_ranks: int, num_batches: float = math.inf
) -> FixedSubset:
    """Of the training data, 4,096 samples by default.

    Args:
        loader: of the training data.
        max_samples: how many.
        rank: which share.
        num_ranks: how many shares.
        num_batches: how many batches every rank is trained on in an epoch; without shuffling, others never are.

    Raises:
        FlatnessError: several loaders, or a data set without an index.
    """
    if not is_indexed(loader):
        raise FlatnessError(
            "FlatnessCallback(data='train') reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    sampler = sampler_of(loader)
    in_order = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler) and not sampler.shuffle and sampler.dataset is loader.dataset
    )
    first = num_batches * (getattr(loader, "batch_size", None) or 1) * num_ranks if in_order else math.inf
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, first)


def described(loader: Any) -> str:
    """What a loader is, for messages.

    Example:
        >>> described([1, 2])
        'list'
    """
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ + (f" over a {type(dataset).__name__}" if dataset is not None else "")


def sampler_of(loader: Any) -> Any:
    """The sampler of a loader.

    Example:
        >>> type(sampler_of(DataLoader([1, 2, 3]))).__name__
        'SequentialSampler'
    """
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


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


def own_loader(loader: Any, indices: list[int]) -> DataLoader[Any]:
    """A loader over some samples of the user's data set, which shares no iterator, worker or generator with theirs."""
    batches = getattr(loader, "batch_sampler", None) is not None
    batch_size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", 64
    )
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=batch_size if batches else None,
        collate_fn=getattr(loader, "collate_fn", None),
        num_workers=min(1, getattr(loader, "num_workers", 0)),
        worker_init_fn=getattr(loader, "worker_init_fn", None),
        multiprocessing_context=getattr(loader, "multiprocessing_context", None),
        generator=torch.Generator(),  # an iterator draws its base seed here, not from the global generator
    )


def repeatable_batches(loader: DataLoader[Any], model: nn.Module) -> Iterator[Any]:
    """The batches of a loader of our own, with the same random numbers every time; random states are kept."""
    loader.generator.manual_seed(0)
    iterator: Iterator[Any] | None = None
    for index in range(len(loader)):
        with random_states_kept(model), generators_kept(loader.dataset):
            torch.default_generator.manual_seed(index)
            random.seed(index)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(index)
            try:
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator)
            except Exception as error:
                raise FlatnessError(
                    f"FlatnessCallback reads {type(error).__name__}: {error} where it asks the data set for samples by "
                    "their number. Use data='val', or data= with a loader or batches of your own."
                ) from error
        yield batch


def batches_apart(batches: Any, model: nn.Module) -> Iterator[Any]:
    """An iterable's batches, with random states kept."""
    with random_states_kept(model):
        iterator = iter(batches)
    while True:
        with random_states_kept(model):
            batch = next(iterator, iterator)
        if batch is iterator:
            return
        yield batch


def first_batch(loaders: Sequence[Any], model: nn.Module) -> Any | None:
    """The first batch of the data set of the first loader, without touching that loader.

    None where it cannot be told what that loader would read.
    """
    loader = next(iter(loaders), None)
    known = (SequentialSampler, RandomSampler, DistributedSampler)
    if not is_indexed(loader) or type(sampler_of(loader)) not in known:
        return None
    size = getattr(loader, "batch_size", None) or 1
    indices = list(range(min(size, len(cast(Any, loader).dataset))))
    try:
        return next(repeatable_batches(own_loader(loader, indices), model), None)
    except FlatnessError:
        return None


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Do to a batch what the Trainer's loops do, precision and transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    with random_states_kept(pl_module):
        batch = pl_module.on_before_batch_transfer(batch, 0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
