"""Figures of flatness over the epochs, of flatness by layer, and of the block traces of one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_epochs, plain_frame, plot_over_epochs
from lightning_flatness.results import FlatnessReport, LayerFlatness

ACCURACY_COLOUR, FLATNESS_COLOUR = "#1f5fa8", "#c2511b"
EXACT_COLOUR, INEXACT_COLOUR = "#1f5fa8", "#b9b9b9"
DATA = {"val": "validation", "train": "training"}
LABELS = {
    "hessian_trace": "Hessian trace  (loss per squared weight)",
    "relative_flatness": "relative flatness  (loss)",
    "neuronwise_flatness": "neuron-wise flatness  (loss)",
    "layerwise_flatness": "layer-wise flatness  (loss)",
}
# With more layers than this, only every second, third, ... bar is labelled.
MOST_NAMES = 60


def plot_history(
    history: Sequence[Mapping[str, float | None]],
    *,
    accuracy_label: str = "accuracy",
    data: str = "val",
    burn_in: int | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw accuracy (left axis) and relative flatness (right axis, logarithmic if positive) over the epochs.

    The history is :attr:`FlatnessCallback.history`: records with ``epoch``, ``relative_flatness`` (units of the loss)
    and optionally ``accuracy``. If no record has a relative flatness, the Hessian trace is drawn instead. ``data``
    names the data that flatness was measured on: ``"val"``, ``"train"`` or another name. The first ``burn_in`` epochs,
    which a stopping rule ignores, are shaded. The function returns the left axes.
    """
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    epochs = [record["epoch"] or 0 for record in history]
    accuracies = [record.get("accuracy") for record in history]
    measure = "relative_flatness" if any("relative_flatness" in record for record in history) else "hessian_trace"
    flatness = [record.get(measure) for record in history]
    right = ax.twinx()
    if any(value is not None for value in accuracies):
        plot_over_epochs(ax, epochs, accuracies, color=ACCURACY_COLOUR, markersize=3.5)
    plot_over_epochs(right, epochs, flatness, color=FLATNESS_COLOUR, markersize=3.5)
    if all(value is not None and value > 0 for value in flatness):
        right.set_yscale("log")
    label_epochs(ax, [] if burn_in else epochs)
    ax.set_ylabel(accuracy_label, color=ACCURACY_COLOUR)
    name = "relative flatness" if measure == "relative_flatness" else "Hessian trace"
    right.set_ylabel(f"{name} on {DATA.get(data, data)} data", color=FLATNESS_COLOUR)
    ax.tick_params(axis="y", colors=ACCURACY_COLOUR)
    right.tick_params(axis="y", which="both", colors=FLATNESS_COLOUR)
    right.spines[["top"]].set_visible(False)
    plain_frame(ax, "both", hidden=["top"])
    if burn_in:
        first = min(epochs, default=0)
        ax.axvspan(first, burn_in - 0.5, color="0.5", alpha=0.12, linewidth=0)
        middle = (first + burn_in - 0.5) / 2
        ax.annotate("burn-in", (middle, 1.01), xycoords=("data", "axes fraction"), ha="center", color="0.4", fontsize=9)
    return figure, ax


def plot_layers(report: FlatnessReport, measure: str = "relative_flatness", *, ax: Any = None) -> tuple[Any, Any]:
    """Draw one measure of every layer as a bar, in the order in which layers run; bars that are not exact are grey.

    The measures are ``"hessian_trace"`` (loss per squared weight), and ``"relative_flatness"``,
    ``"neuronwise_flatness"`` and ``"layerwise_flatness"`` (units of the loss). The axis is logarithmic if all values
    are positive. Estimates have error bars of plus and minus two standard errors.
    """
    _check(measure, LABELS)
    layers = list(report.layers.values())
    figure, ax = axes_or_new(ax, 7.0, 1.2 + 0.2 * min(max(len(layers), 4), MOST_NAMES))
    values = [getattr(layer, measure) for layer in layers]
    if any(math.isnan(value) for value in values):
        raise FlatnessError(f"{measure} was not measured; choose another measure=, or measure it, too.")
    errors = [2 * layer.standard_errors.get(measure, 0.0) for layer in layers]
    positions = list(range(len(layers)))
    colours = [EXACT_COLOUR if layer.exact else INEXACT_COLOUR for layer in layers]
    ax.barh(positions, values, color=colours, height=0.8)
    if any(errors):
        ax.errorbar(values, positions, xerr=errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    if values and min(values) > 0:
        ax.set_xscale("log")
    step = -(-len(layers) // MOST_NAMES)
    ax.set_yticks(positions[::step], list(report.layers)[::step], fontsize=7)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel(LABELS[measure])
    if not report.exact:
        handles = [ax.barh([0], [0], color=colour) for colour in (EXACT_COLOUR, INEXACT_COLOUR)]
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        ax.legend(handles, ["exact", "not exact"], fontsize=8, frameon=False, **where)
    plain_frame(ax, "x")
    ax.set_axisbelow(True)
    return figure, ax


def plot_layer_history(
    history: Sequence[Mapping[str, float | None]], measure: str = "relative_flatness", *, ax: Any = None
) -> tuple[Any, Any]:
    """Draw one measure of every layer over the epochs, from the first layer (dark) to the last (light).

    The history is :attr:`FlatnessCallback.history`: records with ``epoch`` and ``{layer}/{measure}``, which the
    callback keeps if it measures two or more layers. The measures are ``"hessian_trace"`` (loss per squared weight) and
    ``"relative_flatness"`` (units of the loss). The axis is logarithmic if all values are positive.
    """
    _check(measure, ("hessian_trace", "relative_flatness"))
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    from matplotlib import colormaps  # after axes_or_new, whose error says how to install matplotlib

    suffix = f"/{measure}"
    keys = list(dict.fromkeys(key for record in history for key in record if key.endswith(suffix)))
    epochs = [record["epoch"] or 0 for record in history]
    positive = True
    for index, key in enumerate(keys):
        values = [record.get(key) for record in history]
        positive = positive and all(value > 0 for value in values if value is not None and not math.isnan(value))
        colour = colormaps["viridis"](0.9 * index / max(1, len(keys) - 1))
        label = key.removesuffix(suffix)
        plot_over_epochs(ax, epochs, values, color=colour, markersize=3, linewidth=1.2, label=label)
    if keys and positive:
        ax.set_yscale("log")
    if 0 < len(keys) <= 24:
        columns = 1 if len(keys) <= 12 else 2
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    label_epochs(ax, epochs)
    ax.set_ylabel(LABELS[measure])
    plain_frame(ax, "both")
    return figure, ax


def _check(measure: str, known: Iterable[str]) -> None:
    if measure not in known:
        raise FlatnessError(f"measure={measure!r}: give one of {', '.join(known)}.")


def plot_block_traces(layer: LayerFlatness, *, sort: bool = True, ax: Any = None) -> tuple[Any, Any]:
    """Draw the block traces ``T[s, s']`` (loss per squared weight) as a heat map: red if positive, blue if negative.

    The colour scale ends at the 99th percentile of ``|T|``, so that a few large entries do not hide the rest. With
    ``sort``, filters that interact are placed next to each other, within each group of a grouped convolution. They are
    sorted by the angle of their entries in the two leading eigenvectors of ``T`` normalised to a unit diagonal.
    """
    if layer.block_traces.ndim != 3:
        raise FlatnessError(
            f"Layer '{layer.info.name}' has only the diagonal of its block traces; measure 'relative_flatness' too."
        )
    figure, ax = axes_or_new(ax, 5.6, 4.6)
    traces = layer.block_traces
    if sort:
        orders = [_by_interaction(block) for block in traces]
        traces = torch.stack([block[order][:, order] for block, order in zip(traces, orders, strict=True)])
    matrix = torch.block_diag(*traces)
    entries = traces.abs().flatten()
    limit = float(entries.sort().values[int(0.99 * (len(entries) - 1))]) or float(entries.max()) or 1.0
    image = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, extend="both", label="block trace T[s, s']  (loss per squared weight)")
    bar.formatter.set_powerlimits((-2, 3))
    suffix = " (ordered by interaction)" if sort else ""
    ax.set(xlabel=f"filter s'{suffix}", ylabel=f"filter s{suffix}")
    ax.set_title(f"{layer.info.name}: Hessian trace {layer.hessian_trace:.3g}", fontsize=10)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure, ax


def _by_interaction(block: Tensor) -> Tensor:
    """Return an order of filters: by angle in the plane of the two leading eigenvectors of normalised block traces."""
    if len(block) < 3:
        return torch.arange(len(block), device="cpu")
    scale = block.diagonal().abs().clamp_min(torch.finfo(block.dtype).tiny).rsqrt()
    _, vectors = torch.linalg.eigh(block * scale[:, None] * scale)
    return torch.atan2(vectors[:, -2], vectors[:, -1]).argsort()
