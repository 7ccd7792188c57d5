"""A fixed part of some data, read without a trace on the user's loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness.callbacks.data.loaders import batch_size_of, described, is_indexed, reads_in_order, sampler_of
from lightning_flatness.callbacks.data.reading import batches_apart, own_loader, repeatable_batches
from lightning_flatness.callbacks.data.stratified import choose, labels_of
from lightning_flatness.errors import FlatnessError

DEFAULT_TRAINING_SAMPLES = 4096


class FixedSubset:
    """The same samples every time, read apart from the user's iteration.

    A ``DataLoader`` over a data set with an index is read for its settings and never iterated. Samples pass the data
    set's own transforms and the loader's own ``collate_fn``; random transforms draw the same numbers every time. If the
    loader has workers, the subset is read by one worker of its own; else in the main process, and random states are
    restored, those of the data set's own generators too. Any other iterable of batches is iterated as it is, and random
    states are restored.

    ``max_samples`` are the size of the subset over all ranks, with every class in its share, among the ``first``
    samples; ``num_batches`` are those of this rank, infinite where that is not known.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> subset = FixedSubset(DataLoader(data, batch_size=4, shuffle=True), max_samples=6)
        >>> [len(batch[0]) for batch in subset.batches(nn.Identity())]
        [4, 2]
    """

    def __init__(
        self, loader: Any, max_samples: int | None = None, rank: int = 0, num_ranks: int = 1, first: float = math.inf
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._is_indexed = is_indexed(loader)
        if self._is_indexed:
            indices = _chosen(loader, max_samples, first)[rank::num_ranks]
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
        """Yield this rank's batches; random states of the devices that the model is on are restored."""
        if self._is_indexed:
            return repeatable_batches(self._loader, model)
        return islice(batches_apart(self._loader, model), self._rank, None, self._num_ranks)


def _chosen(loader: Any, max_samples: int | None, first: float) -> torch.Tensor:
    """Indices into the data set of a loader, ``(samples,)``, sorted by their place in the sampler."""
    # A sampler may leave samples out for good (SubsetRandomSampler). Lightning's DistributedSampler has it inside.
    sampler = sampler_of(loader)
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    indices = getattr(sampler, "indices", None)
    allowed = torch.arange(len(loader.dataset), device="cpu")
    if indices is not None:
        allowed = torch.tensor(list(indices), dtype=torch.long, device="cpu")
    allowed = allowed[: int(min(first, len(allowed)))]
    labels = labels_of(loader.dataset)
    number = len(allowed) if max_samples is None else max_samples
    return allowed[choose(len(allowed), number, None if labels is None else labels[allowed])]


def training_subset(
    loader: Any, max_samples: int | None, rank: int, num_ranks: int, num_batches: float = math.inf
) -> FixedSubset:
    """Choose a subset of the training data, by default of 4,096 samples.

    Without shuffling, batches after the ``num_batches`` of an epoch are never trained on, and are left out.
    """
    if not is_indexed(loader):
        raise FlatnessError(
            "data='train' reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    first = num_batches * (batch_size_of(loader) or 1) * num_ranks if reads_in_order(loader) else math.inf
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, first)
