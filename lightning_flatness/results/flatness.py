"""What a measurement gives back: frozen records, readable without the package's machinery."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

# Why a number is an estimate of the whole Hessian.
SAMPLED = "classes without much mass are sampled"


@dataclass(frozen=True)
class LayerInfo:
    """How a layer is measured; what later batches show may change it.

    Attributes:
        name: of the module, without ``_orig_mod.``.
        kind: its class.
        num_filters: ``S``.
        patch_length: ``D``, length of one filter.
        groups: ``G``.
        classifier: name of the linear map under which it lies; None under Gauss-Newton, or when the pooled layer is the
            logits itself.
        method: ``"closed_form"``, the Hessian; ``"gauss_newton"``, a part of it, or all of it where ``exact``; or
            ``"gauss_newton+hutchinson"``, with the other part estimated.
        exact: whether the number is the Hessian's.
        reason: why it is not, where it is not; or that classes are sampled, so that it is an estimate.
        kernel: ``"parameter"`` when derivatives are with respect to the layer's weight; ``"effective"`` when the layer
            computes the kernel it applies (parametrised, standardised) and derivatives are with respect to that.
        deviation: the largest deviation that the certificates have found, relative; some rounding errors of the model's
            precision at most.
        backward_passes: for every batch, shared by all layers; one for every class, but for layers under the closed
            form. Fewer, if all goes well, where classes are sampled.
        multiplications: for every sample, on top of passes through the model.
        memory: bytes of its block traces, those of a batch, and its filters' Gram matrix.
    """

    name: str
    kind: str
    num_filters: int
    patch_length: int
    groups: int
    classifier: str | None
    method: Literal["closed_form", "gauss_newton", "gauss_newton+hutchinson"]
    exact: bool
    reason: str
    kernel: Literal["parameter", "effective"]
    deviation: float
    backward_passes: int = 0
    multiplications: int = 0
    memory: int = 0


def merged(infos: Sequence[LayerInfo]) -> LayerInfo:
    """How a layer was measured by several processes: exact only if by all, with the largest deviation.

    Example:
        >>> info = LayerInfo("conv", "Conv2d", 4, 9, 1, "fc", "closed_form", True, "", "parameter", 1e-7)
        >>> merged([info, replace(info, exact=False, reason="why", deviation=2e-7)]).reason
        'why'
    """
    labelled = sorted(infos, key=lambda info: (info.exact, info.method == "closed_form"))
    return replace(labelled[0], deviation=max(info.deviation for info in infos))


@dataclass(frozen=True)
class LayerFlatness:
    """Flatness of one layer: the mean over ``num_samples`` samples.

    Attributes:
        block_traces: ``T``, float64 ``(G, S/G, S/G)``; ``T[s, s']`` is the trace of the Hessian block of two filters.
            Only its diagonal, ``(G, S/G)``, where relative flatness was not wanted.
        filter_traces: float64 ``(S,)``, Hessian trace of every filter.
        filter_flatness: float64 ``(S,)``, ``‖w_s‖² T[s, s]``; adds up to ``neuronwise_flatness``.
        hessian_trace: loss per squared weight.
        relative_flatness: ``kappa_Tr``, in units of the loss (Petzka et al. 2021, Definition 3); NaN where not wanted.
        neuronwise_flatness: ``sum_s ‖w_s‖² T[s, s]`` (Petzka et al. 2019).
        layerwise_flatness: ``‖W‖_F² Tr(H)`` (Petzka et al. 2019).
        weight_norm: ``‖W‖_F``.
        num_samples: samples measured.
        standard_errors: of the measures, by name, where they are estimated; zero where they are not.
        info: how it was measured.
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

    @property
    def exact(self) -> bool:
        """Whether the number is the Hessian's."""
        return self.info.exact

    @property
    def method(self) -> str:
        """How it was computed, e.g. ``"closed_form"``."""
        return self.info.method


@dataclass(frozen=True)
class LayerLambdaMax:
    """Largest eigenvalues of the Hessian of one layer's kernel.

    Attributes:
        lambda_max: of the whole block, loss per squared weight.
        residual_norm: ``‖H v - λ v‖`` of its unit vector ``v``: an eigenvalue lies within this of ``lambda_max``.
        num_products: products of the Hessian with vectors that it took.
        layerwise_lambda_max: ``‖W‖² λ_max(H)`` (Petzka et al. 2019), in units of the loss.
        neuronwise_lambda_max: ``sum_s ‖w_s‖² λ_max(H_ss)`` (Petzka et al. 2019); NaN if not wanted.
        filter_lambda_max: ``λ_max(H_ss)``, float64 ``(S,)``; None if not wanted.
        num_samples: samples measured.
        info: how the Hessian was had; where it is not exact, these are eigenvalues of the Gauss-Newton matrix.
    """

    lambda_max: float
    residual_norm: float
    num_products: int
    layerwise_lambda_max: float
    neuronwise_lambda_max: float
    filter_lambda_max: Tensor | None
    num_samples: int
    info: LayerInfo

    @property
    def exact(self) -> bool:
        """Whether the operator is the Hessian's."""
        return self.info.exact


@dataclass(frozen=True)
class FlatnessReport:
    """Flatness of the measured layers of a model; ``print(report)`` shows a table.

    Attributes:
        layers: by module name, in the order in which they run.
        left_out: layers of ``layers="all"`` that cannot be measured, and why.
    """

    layers: Mapping[str, LayerFlatness]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def hessian_trace(self) -> float:
        """Sum of the Hessian traces of the measured layers."""
        return sum(layer.hessian_trace for layer in self.layers.values())

    @property
    def relative_flatness(self) -> float:
        """Sum of the relative flatness of the measured layers."""
        return sum(layer.relative_flatness for layer in self.layers.values())

    @property
    def standard_errors(self) -> dict[str, float]:
        """Standard errors of the two sums, by name, at most: layers share probes, so their errors are simply added."""
        return {
            name: sum(layer.standard_errors.get(name, 0.0) for layer in self.layers.values())
            for name in ("hessian_trace", "relative_flatness")
        }

    @property
    def weight_norm(self) -> float:
        """Norm of all measured kernels together."""
        return math.hypot(*(layer.weight_norm for layer in self.layers.values()))

    @property
    def num_samples(self) -> int:
        """Samples measured."""
        return max((layer.num_samples for layer in self.layers.values()), default=0)

    @property
    def exact(self) -> bool:
        """Whether every layer's number is the Hessian's."""
        return all(layer.exact for layer in self.layers.values())

    def table(self) -> Table:
        """The report as a rich table, a row for every layer."""
        caption = _notes((layer.info for layer in self.layers.values()), self.left_out)
        table = Table(title=f"Flatness over {self.num_samples} samples", caption=caption, caption_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("Hessian trace", "rel. flatness", "neuron-wise", "‖W‖"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("exact", no_wrap=True)
        for name, layer in self.layers.items():
            numbers = [
                _number(getattr(layer, measure), layer.standard_errors.get(measure, 0.0))
                for measure in ("hessian_trace", "relative_flatness", "neuronwise_flatness")
            ]
            table.add_row(name, *numbers, f"{layer.weight_norm:.4g}", "yes" if layer.exact else "no")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def _number(value: float, standard_error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4g}" + (f" ± {standard_error:.1g}" if standard_error else "")


def summary_table(
    layers: Mapping[str, LayerInfo], left_out: Mapping[str, str] | None = None, title: str = "Flatness is measured for"
) -> Table:
    """How every layer is going to be measured, as a rich table."""
    deviation = max((info.deviation for info in layers.values()), default=0.0)
    passes = max((info.backward_passes for info in layers.values()), default=0)
    sentences = []
    if any(info.method == "closed_form" for info in layers.values()):
        sentences.append(
            "Closed form: certified that what follows the layer acts on every channel by itself, and that the head is "
            "linear."
        )
    if passes:
        sentences.append(
            "Gauss-Newton: exact where certified that the logits are affine in the layer's weight; "
            f"{passes} backward passes a batch, for all of its layers together."
        )
    sentences.append(
        f"The largest deviation of derivatives from autograd's is {f'{deviation:.0e}' if deviation else 'zero'}, "
        "relative. M mult.: millions of multiplications for every sample, on top of passes through the model. MB: "
        "memory, at most."
    )
    if any(info.kernel == "effective" for info in layers.values()):
        sentences.append("*: with respect to the kernel that the layer applies, which it computes from its weight.")
    caption = " ".join([*sentences, _notes(layers.values(), left_out or {})]).strip()
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("filters x patch", no_wrap=True)
    table.add_column("method", max_width=14)
    table.add_column("exact", no_wrap=True)
    for heading in ("M mult.", "MB"):
        table.add_column(heading, no_wrap=True, justify="right")
    for info in layers.values():
        table.add_row(
            info.name + ("*" if info.kernel == "effective" else ""),
            f"{info.num_filters} x {info.patch_length}" + (f", {info.groups} groups" if info.groups > 1 else ""),
            METHODS[info.method],
            "yes" if info.exact else "no",
            _millions(info.multiplications),
            _millions(info.memory),
        )
    return table


METHODS = {
    "closed_form": "closed form",
    "gauss_newton": "Gauss-Newton",
    "gauss_newton+hutchinson": "Gauss-Newton + Hutchinson",
}


def _millions(number: int) -> str:
    millions = number / 1e6
    return "<0.1" if millions < 0.1 else f"{millions:,.1f}" if millions < 100 else f"{millions:,.0f}"


def _notes(layers: Iterable[LayerInfo], left_out: Mapping[str, str]) -> str:
    inexact = [info for info in layers if not info.exact]
    texts = {
        "gauss_newton": "the Gauss-Newton part of the Hessian",
        "gauss_newton+hutchinson": "Gauss-Newton exactly and the rest of the Hessian estimated",
    }
    sentences = []
    for method, text in texts.items():
        reasons = sorted({info.reason for info in inexact if info.method == method and info.reason != SAMPLED})
        if reasons:
            sentences.append(f"Not exact: {text}, since {', or '.join(reasons)}.")
    if any(info.reason == SAMPLED for info in inexact):
        sentences.append(f"Estimates, with standard errors: {SAMPLED}.")
    sentences += [f"Left out: {reason}" for reason in left_out.values()]
    return " ".join(sentences)


def as_text(table: Table, width: int = 110) -> str:
    """A rich table as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
