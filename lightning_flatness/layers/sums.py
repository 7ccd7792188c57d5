"""Sums of one layer's block traces and measures over samples, which can be added over batches and ranks.

The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import LossDerivatives
from lightning_flatness.functional.conditions import holds
from lightning_flatness.functional.sampling import grouped
from lightning_flatness.functional.symmetric import Folded
from lightning_flatness.functional.weighting import SAMPLE_MEASURES
from lightning_flatness.layers.certified import CertifiedLayer, CertifiedPass
from lightning_flatness.layers.estimates import BlockTraces

# The values of a sample that do not depend on a layer. They are the `outcomes` of `LossDerivatives`, the trace of the
# loss's second derivative with respect to the logits, and the predicted class.
OUTCOMES = ("weight", "count", "loss", "correct", "curvature", "prediction")
WEIGHT, COUNT, LOSS, CORRECT, CURVATURE, PREDICTION = range(len(OUTCOMES))


class LayerStatistics(NamedTuple):
    """One layer's statistics, summed over samples. These sums are the arguments of ``FlatnessMetric.update``."""

    block_traces: Tensor  # (G, S/G, S/G), or its diagonal (G, S/G), float64, summed over the samples
    weight_gram: Tensor  # Gram matrix of the filters, in the shape of block_traces, float64; not summed
    num_samples: int
    normalizer: float  # divisor of the mean: the number of samples, or the sum of their class weights
    variances: Tensor | None = None  # (6,), of ALL_MEASURES, summed over samples; None if nothing was estimated
    extra: Tensor | None = None  # (2,), sums of the two EXTRA_MEASURES; NaN if not measured
    groups: Tensor | None = None  # (32, 5), for each group of samples the sums of weights and of the 4 SAMPLE_MEASURES


@dataclass(frozen=True)
class LayerSums:
    """The sums of one layer over samples, in a form that can be added to the sums of other samples.

    Symmetric matrices are folded, i.e. kept as upper triangles. The other fields are those of :class:`LayerStatistics`,
    except for ``samples`` and ``outcomes``, which keep the values of single samples.
    """

    block_traces: Folded
    weight_gram: Folded
    num_samples: int
    normalizer: float
    extra: Tensor
    variances: Tensor | None
    samples: Tensor  # (N, 4), the SAMPLE_MEASURES of every sample; NaN if unknown
    outcomes: Tensor  # (N, 6), the OUTCOMES of every sample

    def __add__(self, other: LayerSums) -> LayerSums:
        variances = [one for one in (self.variances, other.variances) if one is not None]
        return LayerSums(
            self.block_traces + other.block_traces,
            self.weight_gram,
            self.num_samples + other.num_samples,
            self.normalizer + other.normalizer,
            self.extra + other.extra,
            torch.stack(variances).sum(0) if variances else None,
            torch.cat([self.samples, other.samples]),
            torch.cat([self.outcomes, other.outcomes]),
        )

    def without_samples(self) -> LayerSums:
        """Return a copy without the values of single samples, to save memory."""
        return replace(self, samples=self.samples[:0], outcomes=self.outcomes[:0])

    def groups(self, positions: Tensor) -> Tensor:
        """Return sums over each of 32 groups of samples, ``(32, 5)``, from which standard errors are computed.

        Column 0 has sums of the samples' weights in the mean loss; the others have sums of the ``SAMPLE_MEASURES``.
        ``positions``, ``(N,)``, are the positions of the samples in the measured set, which determine the group of each
        sample.
        """
        return grouped(torch.cat([self.outcomes[:, WEIGHT, None], self.samples], dim=1), positions)

    def statistics(self, groups: Tensor | None = None) -> LayerStatistics:
        """Return the sums as :class:`LayerStatistics`, with full matrices in place of upper triangles.

        The matrices and ``extra`` share no memory with this object.
        """
        with torch.inference_mode(False):
            traces, gram = self.block_traces.whole(), self.weight_gram.whole()
            return LayerStatistics(
                traces, gram, self.num_samples, self.normalizer, self.variances, self.extra.clone(), groups
            )


def added(one: dict[str, LayerSums], other: dict[str, LayerSums]) -> dict[str, LayerSums]:
    """Return the sums of ``one`` plus ``other`` for each layer in ``other``, by layer name; ``one`` may be empty."""
    return {name: one[name] + sums if name in one else sums for name, sums in other.items()}


def outcomes_of_pass(certified: CertifiedPass) -> Tensor:
    """Return the ``OUTCOMES`` of every sample of a pass, ``(N, 6)``; without targets, "loss" and "correct" are NaN."""
    loss, logits = certified.loss, certified.recorded.logits.detach()
    known = loss.outcomes
    if known is None:
        known = torch.full((len(logits), CURVATURE), torch.nan, dtype=torch.float64, device=logits.device)
        known[:, :LOSS] = loss.normalizer / len(logits)
    return torch.cat([known, loss.curvature.traces()[:, None], logits.argmax(1).double()[:, None]], dim=1)


def layer_sums(layer: CertifiedLayer, traces: BlockTraces, loss: LossDerivatives, outcomes: Tensor) -> LayerSums:
    """Combine the block traces of a layer and the outcomes of the samples into :class:`LayerSums`.

    Raises:
        BatchError: the block traces are not finite.
    """
    if not holds(traces.total.sum().isfinite()):
        raise BatchError(
            f"The block traces of layer '{layer.info.name}' are not finite: activations overflow, or a derivative "
            "is not finite, e.g. of a square root or norm at zero. Add an epsilon to such a root or norm."
        )
    samples = traces.samples
    if samples is None:
        samples = outcomes.new_full((len(outcomes), len(SAMPLE_MEASURES)), torch.nan)
    if loss.is_pair:  # two equal rows stand for one sample; each of them counts half
        first = outcomes[:1, PREDICTION:]
        samples, outcomes = samples.sum(0, keepdim=True), outcomes.sum(0, keepdim=True)
        outcomes = torch.cat([outcomes[:, :PREDICTION], first], dim=1)
    folded = Folded.of(traces.total)  # keeps the upper triangle: the matrix is symmetric up to rounding
    return LayerSums(
        folded, layer.gram, loss.num_samples, loss.normalizer, traces.extra, traces.variances, samples, outcomes
    )
