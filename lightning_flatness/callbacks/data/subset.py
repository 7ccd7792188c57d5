"""A fixed subset of data, read without changing the user's loader."""

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
    """A subset that consists of the same samples every time it is read.

    If ``loader`` is a ``DataLoader`` over an indexed data set, it is never iterated: a new loader with its settings
    reads the samples. The data set's transforms and the loader's ``collate_fn`` are applied, and random transforms draw
    the same numbers every time. If the user's loader has workers, one new worker reads the subset. Otherwise the main
    process reads it and restores all random states, also of the data set's own generators. Any other iterable of
    batches is iterated directly, and random states are restored.

    ``max_samples`` is the size of the subset over all ranks. The subset is stratified by class, and chosen from the
    samples that the loader's sampler does not leave out, each once, in epochs of ``num_read`` batches. With several
    ranks this may be a collective. ``num_batches`` is the number of batches of this rank, infinite if it is not known.

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
                f"__len__; data= is a {described(loader)}. Give that many samples, or do without max_samples."
            )
        is_stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
        self._loader = own_loader(loader) if is_stream else loader
        self.num_batches = math.inf

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """Yield this rank's batches, and restore random states, also of the devices that the model is on."""
        if self.is_indexed:
            return repeatable_batches(self._loader, model)
        return islice(batches_apart(self._loader, model), self._rank, None, self._num_ranks)


def training_subset(
    loader: Any, max_samples: int | None, rank: int, num_ranks: int, num_batches: float = math.inf
) -> FixedSubset:
    """Return a fixed subset of the training data, by default of 4,096 samples.

    Every epoch trains on ``num_batches`` batches of this rank. Samples that no epoch trains on are not chosen.
    """
    if not is_indexed(loader):
        raise FlatnessError(
            "data='train' reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, num_batches)
