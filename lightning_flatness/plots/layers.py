"""Layers side by side: bars of one report, curves over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_epochs, plain_frame, plot_over_epochs
from lightning_flatness.results import FlatnessReport

EXACT_COLOUR = "#1f5fa8"
INEXACT_COLOUR = "#b9b9b9"
LABELS = {
    "hessian_trace": "Hessian trace  (loss per squared weight)",
    "relative_flatness": "relative flatness  (loss)",
    "neuronwise_flatness": "neuron-wise flatness  (loss)",
    "layerwise_flatness": "layer-wise flatness  (loss)",
}
# With more layers, only every second, third, ... bar is named.
MOST_NAMES = 60


def plot_layers(
    report: FlatnessReport, measure: str = "relative_flatness", *, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw one measure of every layer as a bar, in the order in which layers run; grey if it is not exact.

    The axis is logarithmic if all values are positive. Error bars of estimates are two standard errors long each way.

    Args:
        report: of one or more layers.
        measure: ``"hessian_trace"`` (loss per squared weight), or ``"relative_flatness"``, ``"neuronwise_flatness"`` or
            ``"layerwise_flatness"`` (units of the loss).
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: the measure is unknown or was not measured, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import measure_flatness
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> figure, ax = plot_layers(measure_flatness(net, [torch.randn(6, 4)], layers="all"))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['0', '2']
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
    history: Sequence[Mapping[str, float | None]], measure: str = "relative_flatness", *, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw one measure of every layer over the epochs, from the first layer (dark) to the last (light).

    The axis is logarithmic if all values are positive.

    Args:
        history: records as in :attr:`FlatnessCallback.history`, with ``epoch`` and ``{layer}/{measure}``, which the
            callback keeps for two or more layers.
        measure: ``"hessian_trace"`` (loss per squared weight) or ``"relative_flatness"`` (units of the loss).
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: the measure is unknown, or matplotlib is missing.

    Example:
        >>> figure, ax = plot_layer_history([{"epoch": 0, "conv1/hessian_trace": 2.0}], "hessian_trace")
        >>> [line.get_label() for line in ax.get_lines()]
        ['conv1']
    """
    _check(measure, ("hessian_trace", "relative_flatness"))
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    from matplotlib import colormaps  # after axes_or_new, which names the missing extra

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
