"""Passes over batches that give sums of losses, at the model's own weights and at others."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import CrossEntropy, Loss
from lightning_flatness.measure.batches import batches_on, split_batch
from lightning_flatness.measure.ranks import gather
from lightning_flatness.model.isolation import random_states_kept
from lightning_flatness.model.points import Points

CHUNK = 16
LIGHT_PASS = 5e7  # floating-point operations of one batch


@dataclass(frozen=True)
class Sums:
    """Sums over samples.

    Attributes:
        loss: summed.
        normalizer: what it is divided by.
        num_samples: that count.
        correct: samples whose largest logit is that of their class.
        counted: samples with a class; 0 if targets are not class indices.
    """

    loss: float = 0.0
    normalizer: float = 0.0
    num_samples: int = 0
    correct: float = 0.0
    counted: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    @property
    def mean(self) -> float:
        """Of the loss."""
        return self.loss / self.normalizer

    @property
    def accuracy(self) -> float | None:
        """Part of the samples that is correct; None without classes."""
        return self.correct / self.counted if self.counted else None


class Data:
    """Batches that are gone through again and again, in the same order and with the same random numbers.

    Args:
        model: whose device they go to.
        batches: as the user gives them.
        loss: of one sample.

    Raises:
        FlatnessError: they can be gone through only once.

    Example:
        >>> data = Data(nn.Identity(), [(torch.zeros(3, 4), torch.tensor([0, 1, 2]))], CrossEntropy())
        >>> sum(len(targets) for _, targets in data.pairs())
        3
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, (Iterator, Tensor, dict, str)):
            raise FlatnessError(
                f"batches is a {type(batches).__name__}; it must be gone through once for every few points, so give a "
                "list of (inputs, targets) or a DataLoader."
            )
        self._model, self._batches, self._loss = model, batches, loss
        self._origin = Sums()  # of this rank
        self.batch_sizes: list[list[int]] = []  # of every rank, known after the pass at the origin
        self.chunk = 1  # points that pay to be taken at once, known after the pass at the origin

    def pairs(self) -> Generator[tuple[Any, Tensor]]:
        """Inputs and targets of every batch with samples.

        Raises:
            BatchError: a batch without targets.
        """
        with random_states_kept(self._model), closing(batches_on(self._model, self._batches)) as batches:
            for batch in batches:
                inputs, targets = split_batch(batch)
                if targets is None:
                    raise BatchError("A batch has no targets, which the loss needs; give pairs (inputs, targets).")
                if targets.ndim == 0 or len(targets):
                    yield inputs, targets

    def at_origin(self, points: Points) -> Sums:
        """At the model's own weights, over all ranks.

        Raises:
            BatchError: there is no sample on any rank; what the first rank that failed says.
        """
        own, failure = Sums(), None
        sizes: list[int] = []
        try:
            with closing(self.pairs()) as pairs:
                for inputs, targets in pairs:
                    own = own + self._own(points.own_logits(inputs), targets)
                    if not sizes:
                        first = inputs
                    sizes.append(len(targets))
            self.chunk = _chunk_that_pays(points, first) if sizes else 1
        except Exception as error:
            failure = error
        told = gather((own, sizes, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, _, reason) in enumerate(told):
            if reason is not None:
                raise BatchError(f"The loss of the model could not be computed on rank {rank}: {reason}")
        self._origin, self.batch_sizes = own, [sizes for _, sizes, _ in told]
        self._samples = sum(sizes)
        total = sum((sums for sums, _, _ in told), Sums())
        if not total.normalizer > 0:
            raise BatchError("No sample counts, so there is no loss. Is the data set empty?")
        return total

    def _own(self, logits: Tensor, targets: Tensor) -> Sums:
        targets = targets.to(logits.device)
        if targets.ndim == 0 or len(targets) != len(logits):
            raise BatchError(f"The batch has {len(logits)} logits and targets of shape {tuple(targets.shape)}.")
        found = self._loss(logits, targets)
        kept = self._with_class(logits, targets)
        correct = 0.0 if kept is None else float(_correct(logits, targets, kept))
        total = float(self._loss.total(logits, targets))
        return Sums(total, found.normalizer, found.num_samples, correct, 0 if kept is None else int(kept.sum()))

    def check(self, loss: float) -> None:
        """Refuse a summed loss of this rank, at the model's own weights, that is not that of the first pass.

        Raises:
            BatchError: it is another, beyond rounding.
        """
        first = self._origin.loss
        if abs(loss - first) > 1e-3 * abs(first) + 1e-5 * self._origin.normalizer:
            raise BatchError(
                f"The mean loss of the model is {first / self._origin.normalizer:.6g} in one pass over the batches and "
                f"{loss / self._origin.normalizer:.6g} in another: random augmentation, or noise in the forward. Give "
                "list(loader), and switch the noise off."
            )

    def at(self, points: Points, coordinates: Tensor, recompute: bool) -> Tensor:
        """Summed losses, and correct samples, of this rank, ``(2, points)``; ``coordinates`` is ``(points, axes)``.

        Raises:
            BatchError: the batches are not those of the first pass.
        """
        sums = torch.zeros(2, len(coordinates), dtype=torch.float64)
        if not self._samples:
            return sums
        state = points.at(coordinates)
        if recompute:
            with closing(self.pairs()) as pairs:
                state = points.recompute_statistics(state, (inputs for inputs, _ in pairs))
        samples = 0
        with closing(self.pairs()) as pairs:
            for inputs, targets in pairs:
                logits = points.logits(state, inputs)
                targets = targets.to(logits.device)
                kept = self._with_class(logits[0], targets)
                sums[0] += torch.stack([self._loss.total(one, targets) for one in logits]).cpu()
                if kept is not None:
                    sums[1] += _correct(logits, targets, kept).cpu()
                samples += len(targets)
        if samples != self._samples:
            raise BatchError(
                f"A pass over the batches has {samples} samples, and the first one had {self._samples}; give a list or "
                "a DataLoader that is the same every time."
            )
        return sums

    def _with_class(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """Which samples have a class; None where targets are not class indices, as in regression."""
        whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        if not whole or targets.ndim != 1 or logits.shape[1] < 2 or self._loss.name in ("mse", "binary_cross_entropy"):
            return None
        ignored = self._loss.ignore_index if isinstance(self._loss, CrossEntropy) else None
        return targets != ignored if ignored is not None else torch.ones_like(targets, dtype=torch.bool)


def _chunk_that_pays(points: Points, inputs: Any) -> int:
    """Many points at once where a forward pass is mostly the calling of its operations, else one.

    The numbers were measured, see ``docs/landscape.md``. The rule counts operations, not seconds, so that results are
    the same in every run.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            points.own_logits(inputs)
    except Exception:
        return 1  # the counter does not know every operation; the forward itself has gone well before
    return CHUNK if counter.get_total_flops() < LIGHT_PASS else 1


def _correct(logits: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    return ((logits.argmax(-1) == targets) & kept).double().sum(-1)
