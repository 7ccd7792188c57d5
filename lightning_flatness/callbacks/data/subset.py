"""A fixed part of some data, read without a trace on the user's loader."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness.callbacks.data.loaders import (
    batch_size_of,
    batches_apart,
    described,
    is_indexed,
    own_loader,
    reads_in_order,
    repeatable_batches,
    sampler_of,
)
from lightning_flatness.callbacks.data.stratified import choose, labels_of
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
        self._is_indexed = is_indexed(loader)
        if not self._is_indexed:
            if max_samples is not None:
                raise FlatnessError(
                    "max_samples=... needs a DataLoader over a data set with __getitem__ and "
                    f"__len__; data= is a {described(loader)}. Give that many samples, or do without max_samples."
                )
            streamed = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
            self._loader = own_loader(loader) if streamed else loader
            return
        dataset = loader.dataset
        # A sampler may leave samples out for good (SubsetRandomSampler): those are not of the data.
        sampler = sampler_of(loader)
        sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # in Lightning's DistributedSampler
        indices = getattr(sampler, "indices", None)
        allowed = torch.arange(len(dataset)) if indices is None else torch.tensor(list(indices), dtype=torch.long)
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
        if self._is_indexed:
            self._batches = repeatable_batches(self._loader, model)
        else:
            self._batches = islice(batches_apart(self._loader, model), *self._share.indices(sys.maxsize))

    def up_to(self, fraction: float) -> Iterator[Any]:
        """The next batches, until this fraction of the subset has been given since :meth:`restart`."""
        if fraction < 1 and not self._is_indexed:
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
            "data='train' reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    first = num_batches * (batch_size_of(loader) or 1) * num_ranks if reads_in_order(loader) else math.inf
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, first)
