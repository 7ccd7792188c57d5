"""The flatness of layers and of a whole model, as frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_flatness.results.records import Record, flat
from lightning_flatness.results.tables import LayerInfo, lowest_precision, notes, sentence_of
from lightning_flatness.results.texts import as_text, measured, named, number_of, samples_of

# Measures in the columns of tables, and the headings of the columns.
COLUMNS = {
    "hessian_trace": "Hessian trace",
    "relative_flatness": "rel. flatness",
    "normalized_relative_flatness": "normalised",
    "channelwise_flatness": "channel-wise",
    "neuronwise_flatness": "neuron-wise",
}
ALWAYS = ("hessian_trace", "relative_flatness", "neuronwise_flatness")  # columns shown even if all values are NaN
SUMS = ("hessian_trace", "relative_flatness", "normalized_relative_flatness", "neuronwise_flatness")
MEANS = {"loss": "loss", "accuracy": "accuracy", "curvature": "curvature (trace of Λ)"}


@dataclass(frozen=True, repr=False, eq=False)
class LayerFlatness(Record):
    """Flatness of one layer with ``S`` filters in ``G`` groups.

    ``H`` is the Hessian of the mean loss over ``num_samples`` samples with respect to the layer's kernel ``W``. The
    filters ``w_s`` are the rows of ``W``.

    Attributes:
        block_traces: ``T``, float64 ``(G, S/G, S/G)``, in loss per squared weight; ``T[g, s, s']`` is the trace of the
            block of ``H`` for the filters ``s`` and ``s'`` of group ``g``. If neither relative nor normalised nor
            channel-wise flatness was measured, only the diagonals are there, ``(G, S/G)``. In ``T[s, s']`` below,
            ``s`` and ``s'`` number the filters of all groups.
        filter_traces: Hessian trace of every filter, float64 ``(S,)``, in loss per squared weight.
        filter_flatness: ``‖w_s‖² T[s, s]``, float64 ``(S,)``; its sum is ``neuronwise_flatness``.
        hessian_trace: trace of the layer's Hessian, in loss per squared weight.
        relative_flatness: ``sum_{s, s'} <w_s, w_s'> T[s, s']`` (Petzka et al. 2021, Definition 3), in units of the
            loss. Pairs of filters in different groups do not count. NaN if not measured.
        neuronwise_flatness: ``sum_s ‖w_s‖² T[s, s]`` (Petzka et al. 2019), in units of the loss.
        layerwise_flatness: ``‖W‖_F² Tr(H)`` (Petzka et al. 2019), in units of the loss.
        weight_norm: Frobenius norm ``‖W‖_F`` of the kernel.
        num_samples: number of samples that were measured.
        standard_errors: mapping from measures to the standard errors that random probes cause; zero if the measure was
            computed without probes.
        info: description of how the layer was measured.
        normalized_relative_flatness: relative flatness, in units of the loss, after every input channel is scaled to
            standard deviation one and the weights that read the channel are scaled inversely. Rescaling the input
            channels, with the inverse change of ``W``, does not change this measure (``docs/theory.md``, "Invariance").
            NaN if not measured; zero if all channels are constant.
        channelwise_flatness: ``sum_c sum_{s, s'} <w_sc, w_s'c> Tr(H_{sc, s'c})`` in units of the loss, where ``c`` is
            an input channel and ``w_sc`` the part of filter ``s`` on this channel. Rescaling the input channels does
            not change this measure either. NaN unless the argument ``measures=`` of the measurement names it.
        num_dead_channels: number of input channels that are constant over the first 128 samples. Normalised relative
            flatness leaves these channels out. The number is 0 if that measure was not computed.
        sampling_errors: mapping from measures to their standard errors over samples, i.e. the typical distance between
            the measure and its value on a large data set from the same distribution. NaN if not known.
        largest_tenth: share of relative flatness that comes from the tenth of the samples whose own relative flatness
            is largest. NaN if per-sample values are not known, some are negative, or all are zero.
        samples: mapping from measures to per-sample values ``(N,)``, in the order of the measured samples. Their mean,
            weighted by ``FlatnessReport.samples["weight"]``, is the measure of the layer. Empty unless
            ``per_sample=True``. Values are NaN for samples of weight 0, and where ``residual="hutchinson"`` adds
            an estimate to a layer's numbers. A measure whose values are all NaN has no entry.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> layer = lf.measure_flatness(net, [torch.randn(6, 4)], layers="0").layers["0"]
        >>> layer.block_traces.shape, layer.filter_traces.shape, layer.num_samples, layer.exact
        (torch.Size([1, 5, 5]), torch.Size([5]), 6, True)
    """

    block_traces: Tensor
    filter_traces: Tensor
    filter_flatness: Tensor
    hessian_trace: float
    relative_flatness: float
    neuronwise_flatness: float
    layerwise_flatness: float
    weight_norm: float
    num_samples: int
    standard_errors: Mapping[str, float]
    info: LayerInfo
    normalized_relative_flatness: float = math.nan
    channelwise_flatness: float = math.nan
    num_dead_channels: int = 0
    sampling_errors: Mapping[str, float] = field(default_factory=dict)
    largest_tenth: float = math.nan
    samples: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_features(self) -> int:
        """``m``, the number of weights of one filter, which is the number of features that the filter reads."""
        return self.info.patch_length

    @property
    def flatness_per_feature(self) -> float:
        """Relative flatness divided by ``2 num_features``, as in the bound of Petzka et al. 2021, Theorem 5."""
        return self.relative_flatness / (2 * self.num_features)

    @property
    def exact(self) -> bool:
        """Whether checks against autograd certify that the numbers are those of the whole Hessian."""
        return self.info.exact

    @property
    def method(self) -> str:
        """Name of the method that computed the numbers, such as ``"closed_form"``; see :class:`LayerInfo`."""
        return self.info.method

    def table(self) -> Table:
        """Return a ``rich`` table of the layer's measures."""
        return FlatnessReport({self.info.name: self}).table()

    def shown(self, measure: str) -> str:
        """Return a measure with its errors as text, in the form that tables show."""
        errors = self.sampling_errors.get(measure, math.nan), self.standard_errors.get(measure, 0.0)
        return measured(getattr(self, measure), *errors)

    def _line(self) -> str:
        numbers = f"relative flatness {self.shown('relative_flatness')}, Hessian trace {self.shown('hessian_trace')}"
        return f"{self.info.name}: {numbers}, {number_of(self.num_samples, 'sample')}, {sentence_of(self.info)}"


@dataclass(frozen=True, repr=False, eq=False)
class FlatnessReport(Record):
    """Flatness of the measured layers of a model; ``print(report)`` shows a table.

    Attributes:
        layers: mapping from layer names to results, in the order in which the layers run.
        left_out: with ``layers="all"``, mapping from the names of layers that cannot be measured to the reasons.
        loss: mean loss over the measured samples; NaN if the batches have no targets.
        accuracy: share of the measured samples whose target class has the largest logit; NaN unless targets are class
            indices.
        curvature: mean over samples of the trace of ``Λ``, the loss's second derivative with respect to the logits.
        loss_name: name of the loss, with options that are not the default. If the name does not identify a loss of
            your own, as with a lambda, a hash of its code and options follows.
        data: description of the data, such as ``"val"`` or ``"train"``; empty if not known.
        sampling_errors: mapping from names to standard errors over samples. The names are ``"loss"``, ``"accuracy"``,
            ``"curvature"`` and names of measures. For a measure, this is the error of the sum over layers.
        num_groups: number of groups of samples in the jackknife for ``sampling_errors``. A confidence interval
            (``functional.sampling.interval``) uses the t-distribution with ``num_groups - 1`` degrees of freedom.
        samples: per-sample ``loss``, ``curvature``, ``prediction``, ``correct`` (1, 0, or NaN if unknown) and
            ``weight``, ``(N,)`` each; empty unless ``per_sample=True``. The weight of a sample is the weight of its
            target's class, and 0 for an ignored sample. Loss and curvature are NaN where the weight is 0. With label
            smoothing, samples whose class has weight 0 still add to the mean loss and curvature.
        depth: number of convolutions and linear layers of the whole network; 0 if not known.
        batch_norms: number of BatchNorm layers of the whole network.
        fresh_batch_norms: number of BatchNorm layers whose running statistics were never updated.
        seconds: wall time of the measurement; NaN if not known.

    Example:
        >>> import torch
        >>> from lightning_flatness import measure_flatness
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> report = measure_flatness(net, [torch.randn(6, 4)], layers="all")
        >>> report.num_samples, report.exact, list(report.layers), report.layers["0"].method
        (6, True, ['0', '2'], 'gauss_newton')
    """

    layers: Mapping[str, LayerFlatness]
    left_out: Mapping[str, str] = field(default_factory=dict)
    loss: float = math.nan
    accuracy: float = math.nan
    curvature: float = math.nan
    loss_name: str = ""
    data: str = ""
    sampling_errors: Mapping[str, float] = field(default_factory=dict)
    num_groups: int = 0
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    depth: int = 0
    batch_norms: int = 0
    fresh_batch_norms: int = 0
    seconds: float = math.nan

    @property
    def hessian_trace(self) -> float:
        """Sum of the Hessian traces of the measured layers, in loss per squared weight."""
        return sum(layer.hessian_trace for layer in self.layers.values())

    @property
    def relative_flatness(self) -> float:
        """Sum of the relative flatness of the measured layers, in units of the loss."""
        return sum(layer.relative_flatness for layer in self.layers.values())

    @property
    def normalized_relative_flatness(self) -> float:
        """Sum of the normalised relative flatness of the measured layers, in units of the loss."""
        return sum(layer.normalized_relative_flatness for layer in self.layers.values())

    @property
    def neuronwise_flatness(self) -> float:
        """Sum of the neuron-wise flatness of the measured layers, in units of the loss."""
        return sum(layer.neuronwise_flatness for layer in self.layers.values())

    @property
    def layerwise_flatness(self) -> float:
        """Sum of the layer-wise flatness of the measured layers, in units of the loss."""
        return sum(layer.layerwise_flatness for layer in self.layers.values())

    @property
    def max_relative_flatness(self) -> float:
        """The largest relative flatness of all measured layers, in units of the loss."""
        return max((layer.relative_flatness for layer in self.layers.values()), default=math.nan)

    @property
    def relative_flatness_per_loss(self) -> float:
        """Relative flatness divided by the mean loss; NaN if the loss is zero or not known."""
        return self.relative_flatness / self.loss if self.loss else math.nan

    @property
    def relative_flatness_per_curvature(self) -> float:
        """Relative flatness divided by ``curvature``; NaN if ``curvature`` is zero.

        Confident predictions make both numbers small; the ratio reduces this effect.
        """
        return self.relative_flatness / self.curvature if self.curvature else math.nan

    @property
    def standard_errors(self) -> dict[str, float]:
        """Upper bounds on the standard errors that random probes cause in ``hessian_trace`` and ``relative_flatness``.

        Each bound is the sum of the layers' ``standard_errors``. It is zero if no layer was measured with probes.
        """
        return {
            name: sum(layer.standard_errors.get(name, 0.0) for layer in self.layers.values())
            for name in ("hessian_trace", "relative_flatness")
        }

    @property
    def weight_norm(self) -> float:
        """Frobenius norm of all measured kernels together."""
        return math.hypot(*(layer.weight_norm for layer in self.layers.values()))

    @property
    def num_samples(self) -> int:
        """Number of samples that were measured."""
        return max((layer.num_samples for layer in self.layers.values()), default=0)

    @property
    def exact(self) -> bool:
        """Whether checks against autograd certify for every layer that its numbers are those of its full Hessian."""
        return all(layer.exact for layer in self.layers.values())

    @property
    def precision(self) -> str:
        """The lowest precision in which a layer was measured, such as ``"bfloat16"`` under autocast."""
        return lowest_precision(self._infos).precision if self.layers else "float32"

    @property
    def precision_deviation(self) -> float:
        """Largest relative difference of a layer's trace in half precision from its trace in float32.

        It is measured on a few samples. It is zero if no layer was measured in half precision.
        """
        return lowest_precision(self._infos).precision_deviation if self.layers else 0.0

    @property
    def _infos(self) -> list[LayerInfo]:
        return [layer.info for layer in self.layers.values()]

    def table(self) -> Table:
        """Return a ``rich`` table with a row for every layer and a row with the sums over layers."""
        table = Table(
            title=f"Flatness over {samples_of(self.num_samples, self.data)}",
            caption=" ".join([*self._explanations(), *notes(self._infos, self.left_out)]),
            caption_justify="left",
        )
        columns = {
            name: heading
            for name, heading in COLUMNS.items()
            if name in ALWAYS or not all(math.isnan(getattr(layer, name)) for layer in self.layers.values())
        }
        table.add_column("layer", overflow="fold")
        for heading in (*columns.values(), "‖W‖"):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("exact")
        for name, layer in self.layers.items():
            numbers = [layer.shown(measure) for measure in columns]
            table.add_row(Text(name), *numbers, f"{layer.weight_norm:.4g}", layer.info.label)
        if len(self.layers) > 1:
            table.add_section()
            sums = [self.shown(measure) if measure in SUMS else "" for measure in columns]
            table.add_row("sum", *sums, f"{self.weight_norm:.4g}", "yes" if self.exact else "no")
        return table

    def shown(self, measure: str) -> str:
        """Return the report's value of a measure with its errors, as text for a table.

        ``measure`` is a sum over layers, such as ``"hessian_trace"``, or a mean over samples, such as ``"loss"``.
        """
        errors = self.sampling_errors.get(measure, math.nan), self.standard_errors.get(measure, 0.0)
        return measured(getattr(self, measure), *errors)

    def _explanations(self) -> list[str]:
        """Return sentences that state the mean loss, accuracy and curvature, and explain the errors in the table."""
        means = [f"{name} {self.shown(field)}" for field, name in MEANS.items() if not math.isnan(getattr(self, field))]
        loss = f" ({self.loss_name})" if self.loss_name else ""
        sentences = [f"Mean {', '.join(means)}{loss}."] if means else []
        layers = self.layers.values()
        if any(not math.isnan(layer.normalized_relative_flatness) for layer in layers):
            sentences.append("Normalised: relative flatness for inputs whose channels have standard deviation one.")
        if self.sampling_errors or any(layer.sampling_errors for layer in layers):
            sentences.append("±: standard error over samples.")
        if any(error > 0 for layer in layers for error in layer.standard_errors.values()):
            sentences.append("est. ±: standard error of an estimate.")
        return sentences

    def __str__(self) -> str:
        return as_text(self.table())

    def _line(self) -> str:
        means = [f"loss {self.shown('loss')}"] if not math.isnan(self.loss) else []
        numbers = [
            f"relative flatness {self.shown('relative_flatness')}",
            f"Hessian trace {self.shown('hessian_trace')}",
        ]
        inexact = [name for name, layer in self.layers.items() if not layer.exact]
        exact = f"not exact ({named(inexact)})" if inexact else "exact"
        samples = samples_of(self.num_samples, self.data)
        return ", ".join([number_of(len(self.layers), "layer"), samples, exact, *numbers, *means])

    def _rows(self) -> list[dict[str, Any]]:
        shared = {name: getattr(self, name) for name in ("loss", "accuracy", "curvature", "loss_name", "data")}
        rows = [{"layer": name, **flat(layer._values(tensors=False))} for name, layer in self.layers.items()]
        return [{key: value for key, value in (row | shared).items() if key != "name"} for row in rows]
