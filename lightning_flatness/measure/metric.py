"""Sum the flatness of one layer over batches and ranks, as a ``torchmetrics.Metric``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatness.checks import check_whole
from lightning_flatness.errors import BatchError
from lightning_flatness.functional import measures_of
from lightning_flatness.functional.sampling import GROUPS, sampling_errors
from lightning_flatness.functional.weighting import SAMPLE_MEASURES
from lightning_flatness.layers.options import ALL_MEASURES, EXTRA_MEASURES


class FlatnessMetric(Metric):
    """Computes the Hessian trace and the flatness measures of one layer from sums over batches in float64.

    All states are sums over samples. So the result does not depend on how samples are split over batches, ranks, or
    metrics whose states are merged. The arguments of :meth:`update` come from a
    :class:`~lightning_flatness.FlatnessObserver`. The metric has no reference to a module.

    Args:
        num_filters: number of filters ``S``.
        groups: number of groups ``G`` of the convolution.
        diagonal: keep only the diagonal of the block traces, which saves memory but gives no relative flatness.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        FlatnessError: ``num_filters`` or ``groups`` is not a whole number.
        BatchError: on creation, ``num_filters`` is not a positive multiple of ``groups``; in ``update``, shapes or
            dtypes do not fit; in ``compute``, there are no samples.

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
    normalizer: Tensor
    variances: Tensor
    extra: Tensor
    groups: Tensor

    def __init__(self, num_filters: int, groups: int = 1, diagonal: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("num_filters", num_filters)
        check_whole("groups", groups)
        if groups < 1 or num_filters < 1 or num_filters % groups:
            raise BatchError(f"num_filters={num_filters} must be a positive multiple of groups={groups}.")
        shape: tuple[int, ...] = (groups, num_filters // groups)
        if not diagonal:
            shape = (*shape, shape[-1])
        sizes = {
            "block_traces": shape,
            "weight_gram": shape,
            "num_samples": (),
            "normalizer": (),
            "variances": (len(ALL_MEASURES),),
            "extra": (2,),
            "groups": (GROUPS, 1 + len(SAMPLE_MEASURES)),
        }
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(
        self,
        block_traces: Tensor,
        weight_gram: Tensor,
        num_samples: int,
        normalizer: float | None = None,
        variances: Tensor | None = None,
        extra: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            block_traces: block traces ``(G, S/G, S/G)``, float64, summed over the batch's samples; with ``diagonal``
                only their diagonals ``(G, S/G)``.
            weight_gram: inner products of the filters, float64, in the shape of ``block_traces``.
            num_samples: number of samples in the batch.
            normalizer: divisor of the batch's mean loss, such as the sum of the class weights of its samples; by
                default the number of samples.
            variances: variances ``(6,)`` of the measures, if ``block_traces`` is an estimate.
            extra: normalised and channel-wise flatness, ``(2,)``, summed over the batch's samples; NaN if not measured.
            groups: sums ``(32, 5)``, with a row for each of the 32 groups of samples from which standard errors are
                computed. A row has the sum of the samples' weights, and the sums of the four per-sample measures.
        """
        if self.block_traces.dtype != torch.float64:
            raise BatchError(
                f"FlatnessMetric was cast to {self.block_traces.dtype}, but sums over many batches need float64. Keep "
                "the metric out of modules that are cast, and move the metric only with .to(device)."
            )
        for name, value in (("block_traces", block_traces), ("weight_gram", weight_gram)):
            if value.shape != self.block_traces.shape or value.dtype != torch.float64:
                raise BatchError(
                    f"FlatnessMetric.update: {name} is {value.dtype} {tuple(value.shape)}, expected float64 "
                    f"{tuple(self.block_traces.shape)}."
                )
        # Not in place: a tensor made in inference mode cannot be changed outside inference mode. Other code may use the
        # tensor, too.
        self.block_traces = self.block_traces + block_traces.to(self.block_traces)
        self.weight_gram = torch.add(self.weight_gram, weight_gram.to(self.weight_gram), alpha=num_samples)
        self.num_samples = self.num_samples + num_samples
        self.normalizer = self.normalizer + (num_samples if normalizer is None else normalizer)
        if variances is not None:
            self.variances = self.variances + variances.to(self.variances)
        self.extra = self.extra + (torch.nan if extra is None else extra.to(self.extra))
        self.groups = self.groups + (torch.nan if groups is None else groups.to(self.groups))

    def compute(self) -> dict[str, Tensor]:
        """Return the measures over all samples, as a mapping from names to float64 scalars."""
        return self.measures()

    def measures(self) -> dict[str, Tensor]:
        """Return the measures from the sums that this metric holds now, without communication between ranks."""
        extra = dict(zip(EXTRA_MEASURES, self.extra / self.normalizer, strict=True))
        measured = {name: value for name, value in extra.items() if not bool(value.isnan())}
        return measures_of(*self.means()) | measured

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the block traces and the weight Gram matrix, averaged over the samples in the metric's states."""
        if not bool(self.normalizer > 0):
            raise BatchError(
                "No sample was measured, so there is no flatness. Is the data set empty, or are all targets ignored?"
            )
        return self.block_traces / self.normalizer, self.weight_gram / self.num_samples

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """Draw the measures like other metrics of torchmetrics, and return the figure and its axes.

        ``val`` is a result of ``compute`` or ``forward``, or a list with one result for every step; by default the
        result of ``compute``. The scale is logarithmic if all numbers are positive, because the measures differ in
        units and size.
        """
        results = self.compute() if val is None else val
        steps = list(results) if isinstance(results, Sequence) else [results]
        if not steps:
            raise BatchError("FlatnessMetric.plot: val is an empty list, so there is nothing to draw.")
        _, ax = self._plot(dict(steps[0]) if isinstance(results, Mapping) else [dict(step) for step in steps], ax)
        if all(bool(number > 0) for step in steps for number in step.values()):
            ax.set_yscale("log")
            ax.relim()
            ax.autoscale(axis="y")
        return ax.figure, ax

    def standard_errors(self) -> dict[str, float]:
        """Return a mapping from measures to standard errors of random estimates; zero if a measure is not estimated."""
        errors = (self.variances.sqrt() / self.normalizer).tolist()
        return dict(zip(ALL_MEASURES, errors, strict=True))

    def sampling_errors(self) -> dict[str, float]:
        """Return a mapping from measures to their standard errors over samples; NaN if ``update`` got no ``groups``."""
        errors = sampling_errors(self.groups[:, 1:], self.groups[:, 0]).tolist()
        return dict(zip(SAMPLE_MEASURES, errors, strict=True))
