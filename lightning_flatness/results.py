"""What a measurement gives back: frozen records, readable without the package's machinery."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class LayerInfo:
    """How a layer is measured, known once the first batch has been certified.

    Attributes:
        name: of the module, without ``_orig_mod.``.
        kind: its class.
        num_filters: ``S``.
        patch_length: ``D``, length of one filter.
        groups: ``G``.
        classifier: name of the linear map under which it lies; None when the pooled layer is the logits itself.
        method: ``"closed_form"``, the Hessian; or ``"gauss_newton"``.
        exact: whether the number is the Hessian's.
        reason: why it is not, where it is not.
        kernel: ``"parameter"`` when derivatives are with respect to the layer's weight; ``"effective"`` when the layer
            computes the kernel it applies (parametrised, standardised) and derivatives are with respect to that.
        deviation: the largest deviation that the certificates have found, relative; some rounding errors of the model's
            precision at most.
    """

    name: str
    kind: str
    num_filters: int
    patch_length: int
    groups: int
    classifier: str | None
    method: Literal["closed_form", "gauss_newton"]
    exact: bool
    reason: str
    kernel: Literal["parameter", "effective"]
    deviation: float


@dataclass(frozen=True)
class LayerFlatness:
    """Flatness of one layer: the mean over ``num_samples`` samples.

    Attributes:
        block_traces: ``T``, float64 ``(G, S/G, S/G)``; ``T[s, s']`` is the trace of the Hessian block of two filters.
        filter_traces: float64 ``(S,)``, Hessian trace of every filter.
        filter_flatness: float64 ``(S,)``, ``‖w_s‖² T[s, s]``; adds up to ``neuronwise_flatness``.
        hessian_trace: loss per squared weight.
        relative_flatness: ``kappa_Tr``, in units of the loss (Petzka et al. 2021, Definition 3).
        neuronwise_flatness: ``sum_s ‖w_s‖² T[s, s]`` (Petzka et al. 2019).
        layerwise_flatness: ``‖W‖_F² Tr(H)`` (Petzka et al. 2019).
        weight_norm: ``‖W‖_F``.
        num_samples: samples measured.
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
class FlatnessReport:
    """Flatness of the measured layers of a model; ``print(report)`` shows a table.

    Attributes:
        layers: by module name, in the order in which they run.
    """

    layers: Mapping[str, LayerFlatness]

    @property
    def hessian_trace(self) -> float:
        """Sum of the Hessian traces of the measured layers."""
        return sum(layer.hessian_trace for layer in self.layers.values())

    @property
    def relative_flatness(self) -> float:
        """Sum of the relative flatness of the measured layers."""
        return sum(layer.relative_flatness for layer in self.layers.values())

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
        caption = _why_not_exact(layer.info for layer in self.layers.values())
        table = Table(title=f"Flatness over {self.num_samples} samples", caption=caption, caption_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("Hessian trace", "rel. flatness", "neuron-wise", "‖W‖"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("exact", no_wrap=True)
        for name, layer in self.layers.items():
            numbers = (
                layer.hessian_trace,
                layer.relative_flatness,
                layer.neuronwise_flatness,
                layer.weight_norm,
            )
            table.add_row(name, *(f"{number:.4g}" for number in numbers), "yes" if layer.exact else "no")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def summary_table(layers: Mapping[str, LayerInfo]) -> Table:
    """How every layer is going to be measured, as a rich table."""
    caption = (
        "Closed form: certified that what follows the layer acts on every channel by itself and that the head is "
        "linear. Gauss-Newton: exact where certified that the logits are affine in the layer's weight. Deviation: the "
        "largest found between these derivatives and autograd's, relative."
    )
    if any(info.kernel == "effective" for info in layers.values()):
        caption += " *: with respect to the kernel that the layer applies, which it computes from its weight."
    caption = f"{caption} {_why_not_exact(layers.values())}".strip()
    table = Table(title="Flatness is measured for", caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("kind", overflow="fold")
    for heading in ("filters x patch", "method", "exact", "deviation"):
        table.add_column(heading, no_wrap=True)
    for info in layers.values():
        table.add_row(
            info.name + ("*" if info.kernel == "effective" else ""),
            info.kind,
            f"{info.num_filters} x {info.patch_length}" + (f", {info.groups} groups" if info.groups > 1 else ""),
            info.method.replace("_", " "),
            "yes" if info.exact else "no",
            f"{info.deviation:.0e}" if info.deviation else "0",
        )
    return table


def _why_not_exact(layers: Iterable[LayerInfo]) -> str:
    reasons = sorted({info.reason for info in layers if not info.exact})
    return f"Not exact: the Gauss-Newton part of the Hessian, since {', or '.join(reasons)}." if reasons else ""


def as_text(table: Table, width: int = 110) -> str:
    """A rich table as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
