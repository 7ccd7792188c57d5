"""Flatness of one layer as a ``torchmetrics.Metric``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import (
    hessian_trace,
    layerwise_flatness,
    neuronwise_flatness,
    relative_flatness,
    weight_norm,
)


class FlatnessMetric(Metric):
    """Hessian trace, relative flatness and kin of one convolution, from sums over batches, in float64.

    All states are sums over samples, so updates, ranks and merged copies add up, and any split of the samples gives the
    same number. It takes tensors, never a module; :class:`~lightning_flatness.FlatnessObserver` makes them.

    Args:
        num_filters: ``S``.
        groups: ``G`` of the convolution.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        BatchError: in ``update``, shapes that do not fit; in ``compute``, no samples.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import FlatnessObserver
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer, metric = FlatnessObserver(net), FlatnessMetric(num_filters=4)
        >>> for inputs in torch.randn(3, 5, 1, 8, 8):
        ...     metric.update(*observer(inputs)["0"])
        >>> sorted(metric.compute())
        ['hessian_trace', 'layerwise_flatness', 'neuronwise_flatness', 'relative_flatness', 'weight_norm']
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    block_traces: Tensor
    weight_gram: Tensor
    num_samples: Tensor

    def __init__(self, num_filters: int, groups: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if groups < 1 or num_filters < 1 or num_filters % groups:
            raise BatchError(f"num_filters={num_filters} must be a positive multiple of groups={groups}.")
        shape = (groups, num_filters // groups, num_filters // groups)
        self.add_state("block_traces", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight_gram", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, block_traces: Tensor, weight_gram: Tensor, num_samples: int) -> None:
        """Add one batch.

        Args:
            block_traces: ``(G, S/G, S/G)``, float64, summed over the batch's samples.
            weight_gram: inner products of the filters, same shape, times the number of samples.
            num_samples: in the batch.
        """
        if self.block_traces.dtype != torch.float64:
            raise BatchError(
                f"FlatnessMetric was cast to {self.block_traces.dtype}; sums over many batches need float64. Keep it "
                "off the modules that are cast, and move it with .to(device) only."
            )
        for name, value in (("block_traces", block_traces), ("weight_gram", weight_gram)):
            if value.shape != self.block_traces.shape or value.dtype != torch.float64:
                raise BatchError(
                    f"FlatnessMetric.update: {name} is {value.dtype} {tuple(value.shape)}, expected float64 "
                    f"{tuple(self.block_traces.shape)}."
                )
        # Out of place: a state made under inference mode cannot be written to outside it.
        self.block_traces = self.block_traces + block_traces.to(self.block_traces)
        self.weight_gram = self.weight_gram + weight_gram.to(self.weight_gram)
        self.num_samples = self.num_samples + num_samples

    def compute(self) -> dict[str, Tensor]:
        """The measures over all samples, float64 scalars by name."""
        block_traces, gram = self.means()
        return {
            "hessian_trace": hessian_trace(block_traces),
            "relative_flatness": relative_flatness(block_traces, gram),
            "neuronwise_flatness": neuronwise_flatness(block_traces, gram),
            "layerwise_flatness": layerwise_flatness(block_traces, gram),
            "weight_norm": weight_norm(gram),
        }

    def means(self) -> tuple[Tensor, Tensor]:
        """``T`` and the weight Gram matrix, averaged over the samples of the present (local or synced) states."""
        if not bool(self.num_samples > 0):
            raise BatchError("No sample was measured, so there is no flatness. Is the data set empty?")
        return self.block_traces / self.num_samples, self.weight_gram / self.num_samples
