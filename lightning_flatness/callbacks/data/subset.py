"""A fixed subset of data, read without changing the user's loader."""

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
    """A subset that consists of the same samples every time it is read.

    If ``loader`` is a ``DataLoader`` over an indexed data set, it is never iterated: a new loader with its settings
    reads the samples. The data set's transforms and the loader's ``collate_fn`` are applied, and random transforms draw
    the same numbers every time. If the user's loader has workers, one new worker reads the subset. Otherwise the main
    process reads it and restores all random states, also of the data set's own generators. Any other iterable of
    batches is iterated directly, and random states are restored.

    ``max_samples`` is the size of the subset over all ranks. The subset is stratified by class, and chosen from the
    samples before index ``first``. ``num_batches`` is the number of batches of this rank, infinite if it is not known.

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
        """Yield this rank's batches, and restore random states, also of the devices that the model is on."""
        if self._is_indexed:
            return repeatable_batches(self._loader, model)
        return islice(batches_apart(self._loader, model), self._rank, None, self._num_ranks)


def _chosen(loader: Any, max_samples: int | None, first: float) -> torch.Tensor:
    """Return the chosen indices into the data set of a loader, ``(samples,)``, in the order of the sampler."""
    # A sampler may exclude samples (SubsetRandomSampler). Lightning's DistributedSampler wraps the user's sampler.
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
    """Return a fixed subset of the training data, by default of 4,096 samples.

    Without shuffling, samples after the first ``num_batches`` batches are never trained on, so they are not chosen.
    """
    if not is_indexed(loader):
        raise FlatnessError(
            "data='train' reads a fixed subset of the training data, so it needs one training "
            f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {described(loader)}. Use "
            "data='val', or data= with a loader of your own."
        )
    first = num_batches * (batch_size_of(loader) or 1) * num_ranks if reads_in_order(loader) else math.inf
    return FixedSubset(loader, max_samples or DEFAULT_TRAINING_SAMPLES, rank, num_ranks, first)
