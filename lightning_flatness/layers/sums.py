"""Sums over the samples of a layer, which can be added up over batches and ranks."""

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

# What is known of every sample besides its block traces: the first four are functional.losses.OUTCOMES.
OUTCOMES = ("weight", "count", "loss", "correct", "curvature", "prediction")
WEIGHT, COUNT, LOSS, CORRECT, CURVATURE, PREDICTION = range(len(OUTCOMES))


class LayerStatistics(NamedTuple):
    """Sums over samples of one layer, for ``FlatnessMetric.update``."""

    block_traces: Tensor  # (G, S/G, S/G), or its diagonal (G, S/G), float64, summed over the samples
    weight_gram: Tensor  # of the same shape, float64
    num_samples: int
    normalizer: float  # the divisor of the sum: the number of samples, or the sum of their class weights
    variances: Tensor | None = None  # (6,), of the measures of the sum, if it is estimated
    extra: Tensor | None = None  # (2,), normalised and channel-wise flatness of the sum; NaN if not measured
    groups: Tensor | None = None  # (32, 5), sums over groups of samples: weights, and the four SAMPLE_MEASURES


@dataclass(frozen=True)
class LayerSums:
    """The same sums in a form that can be added: symmetric matrices are folded, i.e. kept as upper triangles."""

    block_traces: Folded
    weight_gram: Folded
    num_samples: int
    normalizer: float
    extra: Tensor
    variances: Tensor | None
    samples: Tensor  # (N, 4), values of SAMPLE_MEASURES; NaN for what is not known
    outcomes: Tensor  # (N, 6), of OUTCOMES, the same for all layers

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
        """Return the sums alone, whose memory does not grow with the samples."""
        return replace(self, samples=self.samples[:0], outcomes=self.outcomes[:0])

    def groups(self, positions: Tensor) -> Tensor:
        """Return sums over groups of samples, by their positions: ``(32, 5)``, weights and SAMPLE_MEASURES."""
        return grouped(torch.cat([self.outcomes[:, WEIGHT, None], self.samples], dim=1), positions)

    def statistics(self, groups: Tensor | None = None) -> LayerStatistics:
        """Return the sums with whole matrices, which share no memory with these."""
        with torch.inference_mode(False):
            traces, gram = self.block_traces.whole(), self.weight_gram.whole()
            return LayerStatistics(
                traces, gram, self.num_samples, self.normalizer, self.variances, self.extra.clone(), groups
            )


def added(one: dict[str, LayerSums], other: dict[str, LayerSums]) -> dict[str, LayerSums]:
    """Add the per-layer sums of ``other`` to those of ``one``."""
    return {name: one[name] + sums if name in one else sums for name, sums in other.items()}


def outcomes_of_pass(certified: CertifiedPass) -> Tensor:
    """Return the outcomes of every sample of a pass, ``(N, 6)``; what depends on targets is NaN without them."""
    loss, logits = certified.loss, certified.recorded.logits.detach()
    known = loss.outcomes
    if known is None:
        known = torch.full((len(logits), CURVATURE), torch.nan, dtype=torch.float64, device=logits.device)
        known[:, :LOSS] = loss.normalizer / len(logits)
    return torch.cat([known, loss.curvature.traces()[:, None], logits.argmax(1).double()[:, None]], dim=1)


def layer_sums(layer: CertifiedLayer, traces: BlockTraces, loss: LossDerivatives, outcomes: Tensor) -> LayerSums:
    """Return the sums of one layer over the samples of a pass."""
    if not holds(traces.total.sum().isfinite()):
        raise BatchError(
            f"The block traces of layer '{layer.info.name}' are not finite: activations overflow in this batch, or a "
            "derivative is not finite (a square root or norm at zero? Add an epsilon there)."
        )
    samples = traces.samples
    if samples is None:
        samples = outcomes.new_full((len(outcomes), len(SAMPLE_MEASURES)), torch.nan)
    if loss.is_pair:  # two rows that are one sample, each of which counts half
        first = outcomes[:1, PREDICTION:]
        samples, outcomes = samples.sum(0, keepdim=True), outcomes.sum(0, keepdim=True)
        outcomes = torch.cat([outcomes[:, :PREDICTION], first], dim=1)
    folded = Folded.of(traces.total)  # symmetric but for rounding
    return LayerSums(
        folded, layer.gram, loss.num_samples, loss.normalizer, traces.extra, traces.variances, samples, outcomes
    )
