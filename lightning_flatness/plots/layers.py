"""Layers side by side: bars at one moment, curves over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_epochs
from lightning_flatness.results import FlatnessReport

EXACT_COLOUR = "#1f5fa8"
INEXACT_COLOUR = "#b9b9b9"
LABELS = {
    "hessian_trace": "Hessian trace  (loss per squared weight)",
    "relative_flatness": "relative flatness  (loss)",
    "neuronwise_flatness": "neuron-wise flatness  (loss)",
    "layerwise_flatness": "layer-wise flatness  (loss)",
}
# More layers than this are named in groups only.
MOST_NAMES = 60


def plot_layers(
    report: FlatnessReport, measure: str = "relative_flatness", *, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw a measure of every layer as bars, in the order in which they run; grey where it is not exact.

    The axis is logarithmic where all values are positive. Whiskers are two standard errors of what is estimated.

    Args:
        report: of several layers.
        measure: ``"hessian_trace"``, ``"relative_flatness"``, ``"neuronwise_flatness"`` or ``"layerwise_flatness"``.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: an unknown measure, or matplotlib is missing.

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
    shown = min(len(layers), MOST_NAMES)
    figure, ax = axes_or_new(ax, 7.0, 1.2 + 0.2 * max(shown, 4))
    values = [getattr(layer, measure) for layer in layers]
    if any(math.isnan(value) for value in values):
        raise FlatnessError(f"{measure} was not measured; choose another measure=, or measure it, too.")
    errors = [2 * layer.standard_errors.get(measure, 0.0) for layer in layers]
    colours = [EXACT_COLOUR if layer.exact else INEXACT_COLOUR for layer in layers]
    positions = list(range(len(layers)))
    ax.barh(positions, values, color=colours, height=0.8)
    if any(errors):
        ax.errorbar(values, positions, xerr=errors, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    if values and min(values) > 0:
        ax.set_xscale("log")
    step = -(-len(layers) // MOST_NAMES)
    names = list(report.layers)
    ax.set_yticks(positions[::step], names[::step], fontsize=7)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel(LABELS[measure])
    if not report.exact:
        handles = [ax.barh([0], [0], color=colour) for colour in (EXACT_COLOUR, INEXACT_COLOUR)]
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        ax.legend(handles, ["exact", "not exact"], fontsize=8, frameon=False, **where)
    _plain(ax, "x")
    return figure, ax


def plot_layer_history(
    history: Sequence[Mapping[str, float | None]], measure: str = "relative_flatness", *, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw a measure of every layer over the epochs, from the first layer (dark) to the last (light).

    Args:
        history: as :attr:`FlatnessCallback.history` keeps it: records with ``epoch`` and, with several layers,
            ``{layer}/{measure}``.
        measure: ``"hessian_trace"`` or ``"relative_flatness"``.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: an unknown measure, or matplotlib is missing.

    Example:
        >>> figure, ax = plot_layer_history([{"epoch": 0, "conv1/hessian_trace": 2.0}], "hessian_trace")
        >>> [line.get_label() for line in ax.get_lines()]
        ['conv1']
    """
    _check(measure, ("hessian_trace", "relative_flatness"))
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    from matplotlib import colormaps  # axes_or_new has said so if it is missing

    suffix = f"/{measure}"
    keys = dict.fromkeys(key for record in history for key in record if key.endswith(suffix))
    names = [key.removesuffix(suffix) for key in keys]
    epochs = [record["epoch"] or 0 for record in history]
    marker = "o" if len(epochs) <= 40 else None
    positive = True
    for index, name in enumerate(names):
        values = [record.get(name + suffix) for record in history]
        numbers = [float("nan") if value is None else value for value in values]
        positive = positive and all(number > 0 for number in numbers if number == number)
        colour = colormaps["viridis"](0.9 * index / max(1, len(names) - 1))
        ax.plot(epochs, numbers, color=colour, marker=marker, markersize=3, linewidth=1.2, label=name)
    if names and positive:
        ax.set_yscale("log")
    if 0 < len(names) <= 24:
        columns = 1 if len(names) <= 12 else 2
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    label_epochs(ax, epochs)
    ax.set_ylabel(LABELS[measure])
    _plain(ax, "both")
    return figure, ax


def _check(measure: str, known: Iterable[str]) -> None:
    if measure not in known:
        raise FlatnessError(f"measure={measure!r}: give one of {', '.join(known)}.")


def _plain(ax: Any, grid: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
