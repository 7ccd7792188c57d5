"""Read a fixed subset of the data, without changing the user's loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness.callbacks.data.loaders import described, is_indexed
from lightning_flatness.callbacks.data.reading import batches_apart, own_loader, repeatable_batches
from lightning_flatness.callbacks.data.sampled import samples_read
from lightning_flatness.callbacks.data.stratified import choose, labels_of
from lightning_flatness.errors import FlatnessError

DEFAULT_TRAINING_SAMPLES = 4096


class FixedSubset:
    """A subset of the data that consists of the same samples every time it is read.

    If ``loader`` is a ``DataLoader`` over an indexed data set, a new loader with the same settings reads the samples,
    and ``loader`` itself is never iterated. Transforms and ``collate_fn`` are applied as usual, and random transforms
    draw the same numbers every time. If ``loader`` has workers, one new worker reads the subset. Otherwise the main
    process reads the subset, and then restores all random states, also those of generators that the data set has.

    A new loader also reads an ``IterableDataset``. Any other iterable of batches is iterated directly, and random
    states are restored after every batch.

    With several ranks, the constructor may be a collective, so all ranks must call it.

    Args:
        loader: a ``DataLoader``, or another iterable of batches.
        max_samples: size of the subset over all ranks; None for all samples that the sampler yields. The subset is
            stratified by class if the labels are known.
        rank: rank of this process.
        num_ranks: number of processes.
        num_read: number of batches of ``loader`` that every rank reads in an epoch. Samples that no epoch reaches are
            not chosen.

    Attributes:
        num_batches: number of batches of the subset on this rank, infinite if unknown.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> subset = FixedSubset(DataLoader(data, batch_size=4, shuffle=True), max_samples=6)
        >>> [len(batch[0]) for batch in subset.batches(nn.Identity())]
        [4, 2]
    """

    def __init__(
        self, loader: Any, max_samples: int | None = None, rank: int = 0, num_ranks: int = 1, num_read: float = math.inf
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self.is_indexed = is_indexed(loader)
        if self.is_indexed:
            read = samples_read(loader, num_read, num_ranks)
            labels = labels_of(loader.dataset)
            number = len(read) if max_samples is None else max_samples
            indices = read[choose(len(read), number, None if labels is None else labels[read])][rank::num_ranks]
            self._loader: Any = own_loader(loader, indices.tolist())
            self.num_batches: float = len(self._loader)
            return
        if max_samples is not None:
            raise FlatnessError(
                "max_samples=... needs a DataLoader over a data set with __getitem__ and "
                f"__len__; data= is a {described(loader)}. Give only the samples to measure, or leave out max_samples."
            )
        is_stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
        self._loader = own_loader(loader) if is_stream else loader
        self.num_batches = math.inf

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """Yield this rank's batches. After each one, restore all random states, also on the devices of ``model``."""
        if self.is_indexed:
            return repeatable_batches(self._loader, model)
        return islice(batches_apart(self._loader, model), self._rank, None, self._num_ranks)


def training_subset(
    loader: Any, max_samples: int | None, rank: int, num_ranks: int, num_batches: float = math.inf
) -> FixedSubset:
    """Return a fixed subset of the training data, by default 4,096 samples.

    ``num_batches`` is the number of batches in a training epoch of this rank. Samples that no epoch reaches are not in
    the subset.

    Raises:
        FlatnessError: The samples of the loader cannot be read by index.
    """
    if not is_indexed(loader):
        raise FlatnessError(
            "data='train' reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, num_batches)
