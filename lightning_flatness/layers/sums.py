"""Sums over the samples of a layer, which can be added up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.symmetric import Folded


class LayerStatistics(NamedTuple):
    """Sums over samples of one layer, for ``FlatnessMetric.update``."""

    block_traces: Tensor  # (G, S/G, S/G), or its diagonal (G, S/G), float64, summed over the samples
    weight_gram: Tensor  # of the same shape, float64
    num_samples: int
    normalizer: float  # the divisor of the sum: the number of samples, or the sum of their class weights
    variances: Tensor | None = None  # (4,), of the measures of the sum, if it is estimated


@dataclass(frozen=True)
class LayerSums:
    """The same sums in a form that can be added: symmetric matrices are folded, i.e. kept as upper triangles."""

    block_traces: Folded
    weight_gram: Folded
    num_samples: int
    normalizer: float
    variances: Tensor | None = None

    def __add__(self, other: LayerSums) -> LayerSums:
        variances = [one for one in (self.variances, other.variances) if one is not None]
        return LayerSums(
            self.block_traces + other.block_traces,
            self.weight_gram,
            self.num_samples + other.num_samples,
            self.normalizer + other.normalizer,
            torch.stack(variances).sum(0) if variances else None,
        )

    def statistics(self) -> LayerStatistics:
        """Return the sums with whole matrices, which share no memory with these."""
        with torch.inference_mode(False):
            traces, gram = self.block_traces.whole(), self.weight_gram.whole()
            return LayerStatistics(traces, gram, self.num_samples, self.normalizer, self.variances)


def added(one: dict[str, LayerSums], other: dict[str, LayerSums]) -> dict[str, LayerSums]:
    """Add the per-layer sums of ``other`` to those of ``one``."""
    return {name: one[name] + sums if name in one else sums for name, sums in other.items()}
