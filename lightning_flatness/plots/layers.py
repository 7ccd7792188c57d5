"""Draw one measure of all layers of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import (
    LEGEND_SIZE,
    axes_or_new,
    draw_dots,
    label_logarithm,
    plain_frame,
    set_heading,
)
from lightning_flatness.plots.words import NAMES, check_measure, exactness, finite, known_error, label_of, loss_of
from lightning_flatness.results import FlatnessReport, LayerFlatness, number_of

# Height of one layer's name, in inches. If the names would overlap, only every second, third, ... name is written.
NAME_HEIGHT = 0.14
HIGHEST = 12.0


def plot_layers(
    report: FlatnessReport, measure: str = "relative_flatness", *, data: str | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Draw one measure of every layer as a dot, from the input (top) to the output (bottom).

    Numbers that are not exact have hollow dots. The axis is logarithmic if all values are positive. Error bars are two
    standard errors. They combine the error over samples with the error of the estimate, if the number is estimated.

    Args:
        report: the report.
        measure: ``"hessian_trace"`` (loss per squared weight), or, in units of the loss, ``"relative_flatness"``,
            ``"normalized_relative_flatness"``, ``"channelwise_flatness"``, ``"neuronwise_flatness"`` or
            ``"layerwise_flatness"``.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name; by default the data
            that the report names.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: ``measure`` is unknown or was not measured, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import measure_flatness
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, ax = plot_layers(measure_flatness(net, [batch], layers="all"))
        >>> ax.get_xlabel()
        'relative flatness  (loss)'
    """
    check_type("report", report, FlatnessReport, "a FlatnessReport")
    check_measure(measure, NAMES)
    layers = list(report.layers.values())
    values = [getattr(layer, measure) for layer in layers]
    if layers and all(math.isnan(value) for value in values):
        raise FlatnessError(
            f"The report has no values of {measure}. Choose another measure=, or measure again with {measure!r} in "
            "measures=."
        )
    figure, ax = axes_or_new(ax, 7.0, min(1.4 + 0.2 * max(len(layers), 6), HIGHEST))
    known = finite(values)
    is_logarithmic = bool(known) and min(known) > 0
    if is_logarithmic:
        ax.set_xscale("log")
    parts = [_errors(layer, measure) for layer in layers]
    bars = [2 * known_error(*pair) for pair in parts]
    draw_dots(ax, values, range(len(layers)), bars, [layer.exact for layer in layers])
    for index, value in enumerate(values):
        if not math.isfinite(value):
            text = "not defined" if math.isnan(value) else "infinite"
            ax.annotate(text, (0.01, index), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    if is_logarithmic:
        label_logarithm(ax.xaxis)
    _name_layers(ax, list(report.layers))
    ax.set_xlabel(label_of(measure))
    room = ""
    if not report.exact:
        room = "\u00a0"  # an empty line, which leaves room for the legend between title and axes
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderpad": 0, "borderaxespad": 0.3}
        ax.legend(fontsize=LEGEND_SIZE, frameon=False, **place)
    where = loss_of(report, data)
    method = exactness([layer.info for layer in layers])
    subject = f"layer {next(iter(report.layers))}" if len(layers) == 1 else number_of(len(layers), "layer")
    heading = f"{NAMES[measure][0].upper()}{NAMES[measure][1:]} of {subject}"
    set_heading(ax, heading, "; ".join(filter(None, (where, method))), _bars(parts), room)
    plain_frame(ax, "both")
    return figure, ax


def _errors(layer: LayerFlatness, measure: str) -> tuple[float, float]:
    """Return the standard error over samples and the standard error from random probes; an unknown error is zero."""
    return known_error(layer.sampling_errors.get(measure)), known_error(layer.standard_errors.get(measure))


def _bars(parts: Sequence[tuple[float, float]]) -> str:
    """Return a line that explains the error bars; return an empty text if there are no error bars."""
    kinds = (any(sampling for sampling, _ in parts), any(estimate for _, estimate in parts))
    words = [word for word, there in zip(("over samples", "of estimates"), kinds, strict=True) if there]
    return f"bars: ± 2 standard errors {' and '.join(words)}" if words else ""


def _name_layers(ax: Any, names: Sequence[str]) -> None:
    """Write the names of layers beside the axis, leaving some out so that they do not overlap."""
    height = ax.get_window_extent().height / ax.figure.dpi
    step = max(1, math.ceil(len(names) * NAME_HEIGHT / max(height, NAME_HEIGHT)))
    ax.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_ylabel("input  →  output", rotation=270, va="top", fontsize=LEGEND_SIZE)
