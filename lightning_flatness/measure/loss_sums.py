"""Sum losses over all batches, at the model's own weights and at other points of a landscape."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_flatness.errors import BatchError, is_out_of_memory
from lightning_flatness.functional import CrossEntropy, Loss
from lightning_flatness.functional.losses import are_correct
from lightning_flatness.measure.batches import NO_LOSS, as_batches, check_rereadable, paired_batches, with_targets
from lightning_flatness.measure.ranks import gather, raise_on_all
from lightning_flatness.model.logits import NOT_FINITE, certify_deterministic, question_outputs, what_is_not_finite
from lightning_flatness.model.points import Points

CHUNK = 16  # number of points to compute at once if a forward pass is cheap
LIGHT_PASS = 5e7  # a forward pass on one batch is cheap if it has fewer floating-point operations than this


@dataclass(frozen=True)
class LossSums:
    """Sums of losses, and numbers of samples. Two such objects can be added."""

    loss: float = 0.0
    normalizer: float = 0.0  # the mean loss is loss / normalizer
    num_samples: int = 0  # samples whose targets are not ignored
    correct: float = 0.0  # number of samples whose largest logit is that of their class; NaN if not known

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean(self) -> float:
        """The mean loss."""
        return self.loss / self.normalizer

    @property
    def accuracy(self) -> float | None:
        """The share of correctly classified samples; None if a target is not a class index."""
        return None if math.isnan(self.correct) else self.correct / self.num_samples


@dataclass(frozen=True)
class Origin:
    """Results of the first pass over the batches, with the model's own weights."""

    sums: LossSums  # with sync, over the batches of all ranks
    own: LossSums  # over the batches of this rank
    batch_sizes: list[list[int]]  # sizes of the batches, one list for each rank
    num_samples: int  # number of samples of this rank, including samples with ignored targets
    chunk: int  # number of points to compute at once
    not_finite: str = ""  # why logits are not finite, with a remedy; empty if all are finite

    def check(self, loss: float) -> None:
        """Raise an error if ``loss``, the sum of losses in a later pass of this rank, differs from the first pass."""
        first = self.own.loss
        if abs(loss - first) > 1e-3 * abs(first) + 1e-5 * self.own.normalizer:
            raise BatchError(
                f"The mean loss of the model is {self.own.mean:.6g} in one pass over the batches and "
                f"{loss / self.own.normalizer:.6g} in another. If the loader augments at random, give list(loader). "
                "If the forward pass has noise, switch it off."
            )


class RepeatedBatches:
    """Batches that are read many times, always in the same order and with the same random numbers."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss, sync: bool) -> None:
        check_rereadable(batches, "every point needs a pass over the batches")
        self._model, self._batches, self._loss = model, as_batches(batches), loss
        self.sync = sync

    def pairs(self) -> Generator[tuple[Any, Tensor]]:
        """Yield inputs and targets of every batch that has samples; closing the generator restores random states."""
        with paired_batches(self._model, self._batches) as pairs:
            yield from with_targets(pairs)

    def at_origin(self, points: Points) -> Origin:
        """Make the first pass over the batches, with the model's own weights, and return its results.

        With ``sync`` this is a collective: call it on every rank. If one rank fails, all ranks raise an error. Raise a
        :class:`BatchError` if there is no sample, or if the targets of all samples are ignored. Raise a
        :class:`LayerSelectionError` if two forward passes on the same samples give different logits.
        """
        own, failure, chunk, not_finite = LossSums(), None, 1, ""
        sizes: list[int] = []
        try:
            with closing(self.pairs()) as pairs:
                for inputs, targets in pairs:
                    logits = points.own_logits(inputs)
                    if logits.isfinite().all():
                        # Every point has the same random numbers, so that losses would not show a random forward.
                        certify_deterministic(logits, points.own_logits(inputs))
                    elif not not_finite:
                        not_finite = NOT_FINITE + what_is_not_finite(self._model, inputs)
                    own = own + self._sums(logits, targets)
                    if not sizes:
                        first = inputs
                        question_outputs(logits, self._loss)
                    sizes.append(len(targets))
            if sizes:
                chunk = _worthwhile_chunk(points, first)
        except Exception as error:
            failure = error
            if is_out_of_memory(error):
                failure = BatchError(f"Out of memory in batch {len(sizes)}. Give smaller batches.")
                failure.__cause__ = error
        raise_on_all(failure, self.sync)
        ranks = gather((own, sizes, not_finite), self.sync)
        total = sum((sums for sums, *_ in ranks), LossSums())
        if not total.normalizer > 0:
            raise BatchError(NO_LOSS)
        not_finite = next(filter(None, (reason for *_, reason in ranks)), "")
        return Origin(total, own, [sizes for _, sizes, _ in ranks], sum(sizes), chunk, not_finite)

    def at(self, points: Points, coordinates: Tensor, recompute: bool, origin: Origin) -> Tensor:
        """Return two sums over this rank's batches at several points, float64 ``(2, points)``.

        They are the sum of the losses and the number of correctly classified samples. ``coordinates`` have shape
        ``(points, axes)``. With ``recompute``, BatchNorm's statistics are computed anew at every point.
        """
        sums = torch.zeros(2, len(coordinates), dtype=torch.float64, device="cpu")
        if not origin.num_samples:
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
                sums[0] += torch.stack([self._loss.total(one, targets) for one in logits]).cpu()
                sums[1] += self._correct(logits, targets).sum(-1).cpu()
                samples += len(targets)
        if samples != origin.num_samples:
            raise BatchError(
                f"A pass over the batches has {samples} samples, but the first pass had {origin.num_samples}. Give a "
                "list, or a DataLoader that yields the same samples every time."
            )
        return sums

    def _sums(self, logits: Tensor, targets: Tensor) -> LossSums:
        """Return the sums over one batch; raise an error if logits and targets differ in length."""
        targets = targets.to(logits.device)
        if len(targets) != len(logits):
            raise BatchError(
                f"The model returns logits for {len(logits)} samples, but targets have shape {tuple(targets.shape)}. "
                "Give one target for each sample."
            )
        derivatives = self._loss(logits, targets)
        return LossSums(
            float(self._loss.total(logits, targets)),
            derivatives.normalizer,
            derivatives.num_samples,
            float(self._correct(logits, targets).sum()),
        )

    def _correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return which samples are classified correctly at each point, ``(..., N)``, as ``are_correct`` does."""
        kept = targets.long() != self._loss.ignore_index if isinstance(self._loss, CrossEntropy) else None
        return are_correct(logits, targets, kept)


def _worthwhile_chunk(points: Points, inputs: Any) -> int:
    """Return how many points to compute at once: ``CHUNK`` if a forward pass has few operations, otherwise 1.

    A small forward pass spends most of its time on launching operations, and several points can share this time.
    ``LIGHT_PASS`` was found by measuring (``docs/landscape.md``). Floating-point operations are counted instead of
    seconds, so that every run gives the same result.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            points.own_logits(inputs)
    except Exception:
        return 1  # the counter does not support every operation; the forward pass itself has succeeded before
    return CHUNK if counter.get_total_flops() < LIGHT_PASS else 1
