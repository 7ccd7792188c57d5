"""Find out which samples a loader reads, without iterating over the loader or changing any state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from operator import index as as_index
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_flatness.callbacks.data.loaders import batch_size_of, keeps_order, sampler_of
from lightning_flatness.callbacks.data.reading import seed_all
from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.ranks import gather, raise_on_all
from lightning_flatness.model.generators import drawing, generators_kept, seed_generators
from lightning_flatness.model.isolation import random_states_kept

# Number of epochs that are drawn from a sampler of an unknown class: FEW_EPOCHS at first, and MANY_EPOCHS if the first
# epochs have different samples.
FEW_EPOCHS, MANY_EPOCHS = 3, 16
# A sampler counts as endless if it yields more indices than ten passes over the data set, and more than a million.
MOST_PASSES, MOST_SAMPLES = 10, 1_000_000


def samples_read(loader: Any, num_batches: float = math.inf, num_ranks: int = 1) -> Tensor:
    """Return the sorted indices of all samples that a loader reads when every rank runs ``num_batches`` batches.

    If the sampler shuffles, return all samples that it can yield, because the first ``num_batches`` batches have other
    samples in every epoch. If the sampler's class is unknown, find the samples by drawing a few epochs from a copy of
    the sampler. With several ranks, this drawing is a collective.
    """
    sampler = sampler_of(loader)
    if not keeps_order(loader):
        return _drawn(loader, loader.batch_sampler, num_batches, num_ranks)
    limit = num_batches * (batch_size_of(loader) or 1)
    shared = _shared_by_ranks(sampler)
    if shared is not None:
        limit = math.inf if sampler.shuffle else min(limit * sampler.num_replicas, sampler.total_size)
        sampler = shared
    known = _known(sampler)
    if known is None:
        return _drawn(loader, sampler, limit, num_ranks)
    indices, is_ordered = known
    return _unique(indices[: int(min(limit, len(indices)))] if is_ordered else indices, loader)


def _shared_by_ranks(sampler: Any) -> Any | None:
    """Return the sampler whose samples a distributed ``sampler`` divides among the ranks.

    Return None if ``sampler`` is not of a known distributed class.
    """
    if type(sampler) is DistributedSampler:
        return SequentialSampler(sampler.dataset)  # type: ignore[arg-type]
    # Lightning's wrapper has no public name for the sampler that it wraps.
    is_lightning = type(sampler).__name__ == "DistributedSamplerWrapper"
    return getattr(getattr(sampler, "dataset", None), "_sampler", None) if is_lightning else None


def _known(sampler: Any) -> tuple[Tensor, bool] | None:
    """Return the indices that a sampler can yield, and whether it yields them in the same order in every epoch.

    Return None for unknown classes. A subclass of a known class counts as unknown, because it may yield other indices.
    """
    kind = type(sampler)
    if kind in (SequentialSampler, RandomSampler):
        return torch.arange(len(sampler.data_source), device="cpu"), kind is SequentialSampler
    if kind is SubsetRandomSampler:
        return _as_indices(sampler.indices, sampler), False
    if kind is WeightedRandomSampler:
        return sampler.weights.nonzero().flatten().cpu(), False
    if kind in (list, tuple, range) or isinstance(sampler, Tensor):
        return _as_indices(sampler, sampler), True
    return None


def _drawn(loader: Any, sampler: Any, limit: float, num_ranks: int) -> Tensor:
    """Return all indices that copies of a sampler or batch sampler yield in a few epochs, on all ranks together.

    If all epochs have the same order, return only the indices in the first ``limit`` items of an epoch. An item is an
    index, or a batch of indices if ``sampler`` is a batch sampler.
    """
    sets: list[Tensor] = []
    error: Exception | None = None
    for number in (FEW_EPOCHS, MANY_EPOCHS):
        try:
            sets = [_unique(indices, loader) for indices in _epochs(loader, sampler, limit, number)]
        except Exception as caught:
            error = caught
        if num_ranks > 1:
            raise_on_all(error, sync=True)
            sets = [torch.cat(parts).unique() for parts in zip(*gather(sets, sync=True), strict=True)]
        elif error is not None:
            raise error
        if all(torch.equal(one, sets[0]) for one in sets):
            return sets[0]
    found: Tensor = torch.cat(sets).unique()
    rank_zero_warn(
        f"A {type(sampler).__name__} leaves out different samples in every epoch. The {len(found)} samples that it "
        f"reads in {MANY_EPOCHS} epochs are measured. To measure other samples, give your own loader or "
        "batches as data=."
    )
    return found


def _epochs(loader: Any, sampler: Any, limit: float, number: int) -> list[Tensor]:
    """Draw ``number`` epochs from a copy of a sampler, and return the indices of each epoch.

    Random seeds are fixed. If all epochs are alike, return only the indices in the first ``limit`` items of each. An
    item of a sampler is an index, or a list of the indices of a batch.
    """
    epochs: list[Tensor] = []
    ends: list[int] = []
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with random_states_kept(nn.Identity()), torch.random.fork_rng(cuda), generators_kept(drawing(loader)):
        try:
            copied = deepcopy(sampler, {id(loader.dataset): loader.dataset})
            for epoch in range(number):
                seed_all(epoch)
                seed_generators(copied, epoch)
                for part in (copied, getattr(copied, "sampler", None)):
                    set_epoch = getattr(part, "set_epoch", None)
                    if callable(set_epoch):  # as Lightning does before every epoch
                        set_epoch(epoch)
                indices, end = _one_epoch(copied, limit, loader)
                epochs.append(indices)
                ends.append(end)
        except FlatnessError:
            raise
        except Exception as error:
            raise _unknown(sampler, f"a copy of it raises {type(error).__name__}: {error}") from error
    is_ordered = all(torch.equal(indices, epochs[0]) for indices in epochs)
    return [indices[:end] if is_ordered else indices for indices, end in zip(epochs, ends, strict=True)]


def _one_epoch(sampler: Any, limit: float, loader: Any) -> tuple[Tensor, int]:
    """Draw one epoch; return its indices, and how many of these are in the first ``limit`` items of the epoch."""
    most = max(MOST_PASSES * len(loader.dataset), MOST_SAMPLES)
    try:
        length: float = len(sampler)
    except TypeError:
        length = limit
    length = limit if length > most else length
    yields_batches = not keeps_order(loader)
    indices: list[int] = []
    end = 0
    for number, item in enumerate(islice(sampler, None if math.isinf(length) else int(length))):
        indices += map(as_index, item) if yields_batches else [as_index(item)]
        end = len(indices) if number < limit else end
        if len(indices) > most:
            raise _unknown(sampler, "it seems to have no end")
    return torch.tensor(indices, dtype=torch.long, device="cpu"), end


def _as_indices(values: Iterable[Any], sampler: Any) -> Tensor:
    try:
        return torch.tensor([as_index(value) for value in values], dtype=torch.long, device="cpu")
    except TypeError as error:
        raise _unknown(sampler, f"its entries are not all whole numbers ({error})") from error


def _unique(indices: Tensor, loader: Any) -> Tensor:
    """Return sorted indices without repetitions. A negative index counts from the end of the data set."""
    unique: Tensor = torch.where(indices < 0, indices + len(loader.dataset), indices).unique()
    return unique


def _unknown(sampler: Any, reason: str) -> FlatnessError:
    return FlatnessError(
        f"It is not known which samples the sampler, a {type(sampler).__name__}, reads: {reason}. Use data='val', or "
        "data= with a loader or batches of your own."
    )
