"""Select the samples to measure in the validated batches. There are at most ``max_samples``, and none is repeated."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_flatness.callbacks.data.loaders import batch_size_of, is_indexed, keeps_order, reads_in_order, sampler_of
from lightning_flatness.callbacks.data.stratified import choose, labels_of

TWICE = "Samples that a DistributedSampler repeats count twice."
ALL = "All samples of these batches are measured, also repeated ones and those beyond max_samples=."


class ValidationStream:
    """The sequence of samples of one loader that all ranks together validate.

    A sample is identified by its position in this sequence. A ``DistributedSampler`` appends repeated samples until
    every rank has equally many. The stream leaves out the repeated samples, so that several processes measure the same
    samples as one process. With ``max_samples``, only samples at some positions are measured. These positions are the
    same in every epoch, and so are the samples at them, unless the loader shuffles.

    Args:
        loader: the loader that Lightning validates; None if Lightning combines several loaders.
        num_batches: the number of batches that Lightning runs.
        max_samples: number of samples to measure over all ranks; None for all.
        rank: rank of this process.
        num_ranks: number of processes.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> stream = ValidationStream(DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4), 3, max_samples=5)
        >>> sum(int(stream.mask(rows, index).sum()) for index, rows in enumerate([4, 4, 2]))
        5
    """

    def __init__(
        self,
        loader: Any | None,
        num_batches: float,
        max_samples: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._shard = None if loader is None else _Shard(loader, num_batches, rank, num_ranks)
        self._num_ranks = num_ranks
        self._has_warned = False
        self._chosen: Tensor | None = None  # a mask of the positions to measure on this rank
        self._num_left: int | None = None  # samples still to measure on this rank, if the loader's length is unknown
        self._order: Tensor | None = None  # for each chosen position, the number of chosen positions before it
        if max_samples is None:
            return
        if self._shard is None or self._shard.total is None:
            self._num_left = max_samples // num_ranks + (rank < max_samples % num_ranks)
            return
        chosen = torch.zeros(self._shard.total, dtype=torch.bool, device="cpu")
        chosen[choose(len(chosen), max_samples, self._shard.labels())] = True
        self._order = chosen.cumsum(0) - 1
        self._chosen = self._shard.share(chosen)

    def mask(self, rows: int, batch_idx: int) -> Tensor:
        """Return a Boolean mask ``(rows,)`` that is True for the rows to measure in a batch."""
        mask = torch.ones(rows, dtype=torch.bool, device="cpu")
        if self._num_left is not None:
            mask[self._num_left :] = False
            self._num_left -= int(mask.sum())
        shard, chosen = self._shard, self._chosen
        if shard is None:
            if self._num_ranks > 1:
                self._warn("the loaders are combined")
        elif shard.repeats or chosen is not None:
            positions = shard.positions(rows, batch_idx)
            if positions is None:
                if shard.is_in_order:
                    self._warn("their sizes are not those that the sampler gives", ALL)
                else:
                    self._warn("a custom batch sampler chooses them")
                return mask
            mask &= positions < shard.length
            if chosen is not None:
                mask &= chosen[positions.clamp_max(len(chosen) - 1)] & (positions < len(chosen))
        return mask

    def order(self, rows: int, batch_idx: int) -> Tensor | None:
        """Return the index of each row of a batch in the list of all ranks' measured samples, or None if unknown."""
        positions = None if self._shard is None else self._shard.positions_of_samples(rows, batch_idx)
        if positions is None or self._order is None:
            return positions if self._num_left is None else None
        return self._order[positions.clamp_max(len(self._order) - 1)]

    def _warn(self, reason: str, consequence: str = TWICE) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"FlatnessCallback cannot tell which samples are in these validation batches ({reason}). {consequence}"
            )
        self._has_warned = True


class _Shard:
    """The samples of a :class:`ValidationStream` over all ranks: their number, their positions and their classes.

    Attributes:
        length: number of different samples, 0 if unknown.
        repeats: whether the sampler repeats samples.
        total: number of samples that Lightning runs, None if unknown.
        is_in_order: whether batches are filled in the order in which the sampler yields the samples.
        has_ready_batches: whether every item of the data set is a batch, as with ``batch_size=None``.
    """

    def __init__(self, loader: Any, num_batches: float, rank: int, num_ranks: int) -> None:
        self._loader = loader
        self.has_ready_batches = getattr(loader, "batch_sampler", None) is None
        self._ready_rows = 0  # with ready batches, the number of rows in the first of them
        self._batch_size = batch_size_of(loader) or 1
        self.is_in_order = keeps_order(loader)
        sampler = sampler_of(loader)
        self.length = len(loader.dataset) if is_indexed(loader) else 0
        self.repeats = False
        if isinstance(sampler, DistributedSampler):
            self._step, self._first = sampler.num_replicas, sampler.rank
            self._rank, self._num_ranks = 0, 1  # each rank has other samples, so nothing is left to divide
            self.length = sampler.total_size if sampler.drop_last else len(sampler.dataset)  # type: ignore[arg-type]
            self.repeats = not sampler.drop_last and self.length % self._step > 0
        else:
            self._step, self._first = 1, 0
            self._rank, self._num_ranks = rank, num_ranks
            if self.length and hasattr(sampler, "__len__"):
                self.length = len(sampler)
        num_run = min(num_batches * self._batch_size * self._step, self.length)
        self.total = int(num_run) if self.length and self.is_in_order and not self.has_ready_batches else None

    def labels(self) -> Tensor | None:
        """Return the class of every sample that Lightning runs, or None if the labels or their order are unknown."""
        labels = labels_of(self._loader.dataset) if reads_in_order(self._loader) else None
        return None if labels is None else labels[: self.total]

    def share(self, chosen: Tensor) -> Tensor:
        """Return a mask of those chosen positions that this rank measures.

        If every rank runs all samples, each rank takes an equal part of ``chosen``. If a ``DistributedSampler`` gives
        every rank different samples, the mask is ``chosen`` itself.
        """
        positions = chosen.nonzero().flatten()
        share = torch.zeros_like(chosen)
        share[positions[self._rank :: self._num_ranks]] = True
        return share

    def positions(self, rows: int, batch_idx: int) -> Tensor | None:
        """Return the positions ``(rows,)`` of the rows of a batch in this loader's stream, or None if unknown.

        If every item of the data set is a batch, all rows of a batch have the position of the batch.
        """
        if not self.is_in_order:
            return None
        if self.has_ready_batches:
            return torch.full((rows,), batch_idx * self._step + self._first, device="cpu")
        before = batch_idx * self._batch_size
        own_length = -(-self.length // self._step)  # samples of this rank, repeated ones included
        if rows != min(self._batch_size, own_length - before):
            return None
        return (before + torch.arange(rows, device="cpu")) * self._step + self._first

    def positions_of_samples(self, rows: int, batch_idx: int) -> Tensor | None:
        """Return the positions of the rows of a batch, like :meth:`positions`, but give every row its own position.

        If every item of the data set is a batch, assume that all batches have as many rows as the first.
        """
        positions = self.positions(rows, batch_idx)
        if positions is None or not self.has_ready_batches:
            return positions
        self._ready_rows = self._ready_rows or rows
        return positions * self._ready_rows + torch.arange(rows, device="cpu")
