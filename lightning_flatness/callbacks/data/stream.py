"""Which samples of the batches that are validated are measured: none twice, and only some if so wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_flatness.callbacks.data.loaders import batch_size_of, is_indexed, keeps_order, reads_in_order, sampler_of
from lightning_flatness.callbacks.data.stratified import choose, labels_of


class ValidationStream:
    """The samples that all ranks together validate, as they come from one loader after the other.

    A ``DistributedSampler`` repeats samples until every rank has as many; the repeated ones are found by their position
    and left out, so that the measurement is that of one process. ``max_samples`` are positions too, the same in every
    epoch, so they are the same samples as long as the loader does not shuffle.

    Args:
        loaders: those that are validated, in turn; none where that is not known.
        num_batches: how many batches of each are run.
        max_samples: size of the part that is measured, over all ranks; all by default.
        rank: of this process.
        num_ranks: how many there are.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> stream = ValidationStream([DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4)], [3], max_samples=5)
        >>> sum(int(stream.mask(rows, index).sum()) for index, rows in enumerate([4, 4, 2]))
        5
    """

    def __init__(
        self,
        loaders: Sequence[Any],
        num_batches: Sequence[int | float],
        max_samples: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        pairs = list(zip(loaders, num_batches, strict=True)) if len(loaders) == len(num_batches) else []
        self._shards = [_Shard(loader, count, rank, num_ranks) for loader, count in pairs]
        self._warned = False
        self._num_ranks = num_ranks
        self._chosen: list[Tensor | None] = [None] * len(pairs)
        self._left: int | None = None  # of a stream of unknown length the first samples are taken
        if max_samples is None:
            return
        totals = [shard.total for shard in self._shards]
        known = [total for total in totals if total is not None]
        if len(known) < len(totals) or not totals:
            self._left = max_samples // num_ranks + (rank < max_samples % num_ranks)
            return
        labels = [shard.labels() for shard in self._shards]
        with_labels = [part for part in labels if part is not None]
        known_labels = torch.cat(with_labels) if len(with_labels) == len(labels) else None
        whole = torch.zeros(sum(known), dtype=torch.bool)
        whole[choose(len(whole), max_samples, known_labels)] = True
        self._chosen = [shard.share(part) for shard, part in zip(self._shards, whole.split(known), strict=True)]

    def mask(self, rows: int, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Which rows of a batch are measured, ``(rows,)``.

        Args:
            rows: of the batch.
            batch_idx: number of the batch in its loader.
            dataloader_idx: number of the loader.
        """
        everything = torch.ones(rows, dtype=torch.bool)
        if self._left is not None:
            everything[self._left :] = False
            self._left -= int(everything.sum())
        if dataloader_idx >= len(self._shards):
            if self._num_ranks > 1:
                self._warn("the loaders are combined")
            return everything
        shard, chosen = self._shards[dataloader_idx], self._chosen[dataloader_idx]
        if shard.repeats or chosen is not None:
            positions = shard.positions(rows, batch_idx)
            if positions is None:
                self._warn("their sizes are not those of the sampler; max_samples has no effect on them")
                return everything
            everything &= positions < shard.length
            if chosen is not None:
                everything &= chosen[positions.clamp_max(len(chosen) - 1)] & (positions < len(chosen))
        return everything

    def _warn(self, reason: str) -> None:
        if not self._warned:
            rank_zero_warn(
                f"FlatnessCallback cannot tell which samples these validation batches are ({reason}), so samples that "
                "a DistributedSampler repeats count twice."
            )
        self._warned = True


class _Shard:
    """One loader's part of the stream."""

    def __init__(self, loader: Any, num_batches: float, rank: int, num_ranks: int) -> None:
        self._loader = loader
        self._batches = getattr(loader, "batch_sampler", None)  # None: every item of the data set is a batch
        self._batch_size = batch_size_of(loader) or 1
        sampler = sampler_of(loader)
        self._step, self._first = 1, 0
        self._rank, self._num_ranks = rank, num_ranks
        self.length = len(loader.dataset) if is_indexed(loader) else 0
        if isinstance(sampler, DistributedSampler):
            self._step, self._first = sampler.num_replicas, sampler.rank
            self._rank, self._num_ranks = 0, 1  # every position is of one rank only
            self.length = sampler.total_size if sampler.drop_last else len(sampler.dataset)  # type: ignore[arg-type]
        elif self.length and hasattr(sampler, "__len__"):
            self.length = len(sampler)
        self.repeats = (
            isinstance(sampler, DistributedSampler) and not sampler.drop_last and self.length % self._step > 0
        )
        self._in_order = keeps_order(loader)
        drawn = min(num_batches * self._batch_size * self._step, self.length)
        self.total = int(drawn) if self.length and self._in_order and self._batches is not None else None

    def labels(self) -> Tensor | None:
        """Class of every sample of the stream, where the data set has them and they come in its order."""
        labels = labels_of(self._loader.dataset) if reads_in_order(self._loader) else None
        return None if labels is None else labels[: self.total]

    def share(self, chosen: Tensor) -> Tensor:
        """Without a DistributedSampler every rank may see all: each measures its part of what is chosen."""
        positions = chosen.nonzero().flatten()
        share = torch.zeros_like(chosen)
        share[positions[self._rank :: self._num_ranks]] = True
        return share

    def positions(self, rows: int, batch_idx: int) -> Tensor | None:
        """Of the rows of a batch, in the stream of this loader over all ranks; None where that cannot be told."""
        if not self._in_order:
            return None
        if self._batches is None:
            return torch.full((rows,), batch_idx * self._step + self._first)
        before = batch_idx * self._batch_size
        own = -(-self.length // self._step)  # samples of this rank, repeated ones included
        if rows != min(self._batch_size, own - before):
            return None
        return (before + torch.arange(rows)) * self._step + self._first


def select(inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
    """The rows of a batch where the mask is true.

    Example:
        >>> select({"x": torch.arange(3), "scale": torch.ones(1)}, None, torch.tensor([True, False, True]))[0]["x"]
        tensor([0, 2])
    """

    def take(tensor: Tensor) -> Tensor:
        return tensor[mask.to(tensor.device)] if tensor.ndim and len(tensor) == len(mask) else tensor

    return apply_to_collection(inputs, Tensor, take), None if targets is None else take(targets)
