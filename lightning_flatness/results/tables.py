"""Descriptions of how layers are measured, as frozen dataclasses, tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import named, number_of

# ``LayerInfo.reason`` if the numbers are estimates only because classes with little probability mass are sampled.
SAMPLED = "classes with little probability mass are sampled"
METHODS = {
    "closed_form": "closed form",
    "gauss_newton": "Gauss-Newton",
    "gauss_newton+hutchinson": "Gauss-Newton + Hutchinson",
}
# The precisions in which layers can be measured, and their numbers of bits.
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
# Smallest width of the summary table in characters. In a narrower table the caption would have short lines.
WIDTH = 80
# For each method, what the numbers of an inexact layer describe instead of the whole Hessian.
PARTS = {
    "gauss_newton": "the Gauss-Newton part of the Hessian",
    "gauss_newton+hutchinson": "the Gauss-Newton part plus an estimate of the rest of the Hessian",
}
LABELS = {"gauss_newton": "no: Gauss-Newton", "gauss_newton+hutchinson": "no: estimate"}


@dataclass(frozen=True, repr=False)
class LayerInfo(Record):
    """Description of how a layer is measured, made on the first samples. Later batches may change the description.

    The method ``"closed_form"`` uses a formula for the whole Hessian. ``"gauss_newton"`` computes the Gauss-Newton part
    of the Hessian, which is the whole Hessian if ``exact``. ``"gauss_newton+hutchinson"`` also estimates the rest of
    the Hessian from random probes. ``docs/theory.md`` explains the methods.

    Attributes:
        name: name of the module, without the ``_orig_mod.`` that ``torch.compile`` adds.
        kind: name of the module's class.
        num_filters: ``S``, the number of filters.
        patch_length: ``D``, the number of weights of one filter.
        groups: ``G``, the number of groups of the convolution.
        classifier: name of the classifier that the closed form uses; None for Gauss-Newton, or if the layer's pooled
            output is the logits.
        method: ``"closed_form"``, ``"gauss_newton"`` or ``"gauss_newton+hutchinson"``, as above.
        exact: whether checks against autograd certify that the numbers are those of the exact Hessian.
        reason: why the numbers are not exact; empty if they are exact.
        kernel: the tensor with respect to which derivatives are taken: ``"parameter"`` for the layer's weight
            or another parameter, ``"effective"`` for a kernel that the layer computes from parameters.
        deviation: largest relative deviation from autograd that the checks of this layer (certificates) found.
        backward_passes: number of backward passes per batch, shared by all layers. If classes with little probability
            mass are sampled, this is an upper bound.
        multiplications: number of multiplications per sample, without the passes through the model.
        memory: bytes of the summed block traces, the block traces of one batch, and the filters' Gram matrices.
        precision: lowest precision in which samples were measured, such as ``"bfloat16"`` under autocast.
        precision_deviation: in half precision, the relative difference of the trace from the trace in float32, on a
            few samples; in higher precision 0.
        num_classes: number of columns of the logits; 0 if not known.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> info = lf.measure_flatness(net, [torch.randn(6, 4)], layers="0").layers["0"].info
        >>> info.kind, info.num_filters, info.patch_length, info.method, info.exact
        ('Linear', 5, 4, 'gauss_newton', True)
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
    precision: str = "float32"
    precision_deviation: float = 0.0
    num_classes: int = 0

    @property
    def label(self) -> str:
        """Text for the table column "exact": ``"yes"``, or ``"no"`` and what the numbers describe instead."""
        return "yes" if self.exact else "no: estimate" if self.reason == SAMPLED else LABELS.get(self.method, "no")

    def table(self) -> Table:
        """Return a ``rich`` table of how the layer is measured."""
        return summary_table({self.name: self}, title="How a layer is measured", verbose=True)

    def _line(self) -> str:
        size = f"{self.num_filters} x {self.patch_length}"
        return f"{self.name}: {self.kind} {size}, {METHODS[self.method]}, {sentence_of(self)}"


def merged(infos: Sequence[LayerInfo]) -> LayerInfo:
    """Merge several descriptions of one layer, such as those of several processes, into one.

    The result is exact only if all descriptions are exact. It has the largest deviation and the lowest precision of all
    descriptions.
    """
    least_exact = min(infos, key=lambda info: (info.exact, info.method == "closed_form"))
    lowest = lowest_precision(infos)
    return replace(
        least_exact,
        deviation=max(info.deviation for info in infos),
        precision=lowest.precision,
        precision_deviation=lowest.precision_deviation,
    )


def lowest_precision(infos: Sequence[LayerInfo]) -> LayerInfo:
    """Return the description with the lowest precision.

    If several have the lowest precision, return the description whose trace differs most from the trace in float32.
    """
    return min(infos, key=lambda info: (BITS[info.precision], -abs(info.precision_deviation)))


def summary_table(
    layers: Mapping[str, LayerInfo],
    left_out: Mapping[str, str] | None = None,
    title: str = "Flatness is measured for these layers.",
    verbose: bool = False,
) -> Table:
    """Return a table with the method by which each layer is measured; callbacks print this table before training.

    The caption states why layers are left out. With ``verbose``, the table also has the size of every layer (filters x
    weights of one filter) and the multiplications per sample. The caption then also has the largest deviation from
    autograd that the checks of the layers found.
    """
    caption = _caption(list(layers.values()), left_out or {}, verbose)
    table = Table(title=title, caption=caption, caption_justify="left", min_width=WIDTH)
    table.add_column("layer", overflow="fold")
    if verbose:
        table.add_column("filters x patch", no_wrap=True)
    table.add_column("method", max_width=14)
    table.add_column("exact", no_wrap=True)
    if verbose:
        table.add_column("M mult.", no_wrap=True, justify="right")
    table.add_column("memory (MB)", no_wrap=True, justify="right")
    for info in layers.values():
        size = f"{info.num_filters} x {info.patch_length}" + (f", {info.groups} groups" if info.groups > 1 else "")
        table.add_row(
            Text(info.name + ("*" if info.kernel == "effective" else "")),
            *[size] * verbose,
            METHODS[info.method],
            "yes" if info.exact else "no",
            *[_millions(info.multiplications)] * verbose,
            _millions(info.memory),
        )
    return table


def _caption(layers: Sequence[LayerInfo], left_out: Mapping[str, str], verbose: bool) -> str:
    """Return sentences that explain the methods and columns of the summary table."""
    passes = max((info.backward_passes for info in layers), default=0)
    sentences = []
    if any(info.method == "closed_form" for info in layers):
        sentences.append(
            "Closed form: checks show that all operations between the layer and the classifier treat every channel by "
            "itself, and that the classifier is linear."
        )
    if passes:
        sentences.append(
            "Gauss-Newton: exact where checks show that the logits are affine in the layer's weight; "
            f"{number_of(passes, 'backward pass')} per batch, shared by all layers."
        )
    if verbose:
        deviation = max((info.deviation for info in layers), default=0.0)
        shown = f"{deviation:.0e}" if deviation else "zero"
        sentences.append(
            f"Largest relative deviation of derivatives from autograd's: {shown}. "
            "M mult.: millions of multiplications per sample, in addition to passes through the model."
        )
    if any(info.kernel == "effective" for info in layers):
        sentences.append("*: with respect to the kernel that the layer computes from parameters and applies.")
    return " ".join([*sentences, *notes(layers, left_out)])


def notes(layers: Sequence[LayerInfo], left_out: Mapping[str, str]) -> list[str]:
    """Return sentences that say which numbers are not exact and which layers are left out, with the reasons."""
    inexact = [info for info in layers if not info.exact]
    sentences = []
    for method, part in PARTS.items():
        reasons = sorted({info.reason for info in inexact if info.method == method and info.reason != SAMPLED})
        if reasons:
            several = len({info.reason for info in inexact}) > 1
            causes = [reason + _of_layers(inexact, method, reason) * several for reason in reasons]
            sentences.append(f"Not exact: {part}, since {', or '.join(causes)}.")
    if any(info.reason == SAMPLED for info in inexact):
        sentences.append(f"Estimates, with standard errors: {SAMPLED}.")
    if any(BITS[info.precision] < 32 for info in layers):
        sentences.append(f"{precision_of(layers)}.")
    return [*sentences, *(f"Left out: {reason}" for reason in left_out.values())]


def sentence_of(info: LayerInfo) -> str:
    """Return the end of a sentence: "exact", or "not exact" with what the numbers describe instead, and why."""
    if info.exact:
        return "exact"
    part = "estimates" if info.reason == SAMPLED else PARTS.get(info.method, METHODS[info.method])
    return f"not exact: {part}, since {info.reason}"


def _of_layers(infos: Sequence[LayerInfo], method: str, reason: str) -> str:
    """Return the names of the layers with this method and this reason, in parentheses."""
    return f" ({named(info.name for info in infos if (info.method, info.reason) == (method, reason))})"


def precision_of(layers: Sequence[LayerInfo]) -> str:
    """Return a sentence with the lowest precision in which layers were measured, and with its effect on the trace."""
    lowest = lowest_precision(layers)
    change = f"{lowest.precision_deviation:+.1%}".replace("%", " %")
    return (
        f"Features are {lowest.precision}, as in the network's own forward pass; on a few samples the trace differs by "
        f"{change} from the trace with float32 features"
    )


def _millions(number: int) -> str:
    """Return a number in millions, as text."""
    millions = number / 1e6
    return "<0.1" if millions < 0.1 else f"{millions:,.1f}" if millions < 100 else f"{millions:,.0f}"
