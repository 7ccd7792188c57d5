"""Draw the loss along a line in weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness.plots.canvas import (
    LEGEND_SIZE,
    MARKERS,
    SERIES,
    axes_or_new,
    overlays,
    panel_below,
    plain_frame,
    set_joint_heading,
)
from lightning_flatness.plots.landscape import GAPS, axis_names, drawable_losses, gaps, heading
from lightning_flatness.results import LandscapeResult

LOSS_COLOUR, ACCURACY_COLOUR = SERIES[:2]


def plot_line(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    accuracy: bool = True,
    label: str | None = None,
    color: Any = None,
    ends: Sequence[str] = ("model",),
    data: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the loss along a line and, in a panel below, the accuracy in percent if the result has it.

    Points with an infinite or NaN loss are drawn as hatched grey bands, and points that were not computed as dotted
    bands. To compare several lines, draw them into the same ``ax``, each with its own ``label``.

    Args:
        result: a landscape with one axis.
        cap: draw losses above ``cap``, even infinite losses, as if they were ``cap``.
        accuracy: draw the accuracy, unless a ``label`` is given.
        label: name of the line, for the legend. With a label the accuracy is not drawn.
        color: colour of the line.
        ends: one or two names. The first labels the point at coordinate 0, the second the point at coordinate 1, where
            :func:`~lightning_flatness.direction_between` puts the other model.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into; if the accuracy is drawn, its panel takes the lower part of the area of ``ax``.

    Returns:
        The figure and the axes of the loss.

    Raises:
        FlatnessError: the result does not have one axis, it has no finite loss, ``cap`` is not above the lowest loss,
            or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, ax = plot_line(loss_landscape(net, [batch], axes=["random"], steps=5))
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['loss', 'accuracy (%)']
    """
    losses = drawable_losses(result, 1, "plot_line", cap)
    accuracies = result.accuracies if accuracy and label is None else None
    figure, ax = axes_or_new(ax, 6.0, 3.6 if accuracies is None else 4.4)
    (x,) = result.coordinates
    index = len(overlays(ax, "loss"))
    style = {"marker": MARKERS[index % 4], "markersize": 3.0, "linewidth": 1.4}
    (curve,) = ax.plot(x, losses, color=color or SERIES[index % 4], label=label or "loss", **style)
    ax.set_ylabel("loss")
    panels = [ax]
    if accuracies is not None:
        panels.append(panel_below(figure, ax, (3, 2)))
        style = {"marker": "s", "markersize": 2.5, "linewidth": 1.2, "label": "accuracy"}
        panels[1].plot(x, 100 * accuracies, color=ACCURACY_COLOUR, **style)
        panels[1].set(ylabel="accuracy (%)", ylim=(-2, 102))
    half = float(x[1] - x[0]) / 2
    for reason, points in gaps(result, losses).items():
        for missing in x[points].tolist():
            low, high = max(missing - half, float(x[0])), min(missing + half, float(x[-1]))
            labelled = ax.get_legend_handles_labels()[1]
            ax.axvspan(low, high, linewidth=0, label=None if reason in labelled else reason, **GAPS[reason])
    named = {at: name for at, name in enumerate(ends) if float(x[0]) <= at <= float(x[-1])}
    for panel in panels:
        if index == 0:
            for at in named:
                panel.axvline(at, color="0.25", linewidth=0.8, linestyle=":")
        panel.margins(x=0)
        panel.xaxis.get_major_locator().set_params(nbins=5)
        plain_frame(panel, "both")
    if index == 0:
        _name_ends(ax, named)
    panels[-1].set_xlabel(axis_names(result)[0])
    ax.legend(fontsize=LEGEND_SIZE, frameon=False)
    if accuracies is not None:
        panels[1].legend(fontsize=LEGEND_SIZE, frameon=False)
    set_joint_heading(ax, "loss", curve, *heading(result, data))
    return figure, ax


def _name_ends(ax: Any, names: Mapping[int, str]) -> None:
    """Write names at the top of the axes. ``names`` maps the coordinate of each vertical line to its name."""
    low, high = ax.get_xlim()
    for at, name in names.items():
        side = "left" if at < low + 0.8 * (high - low) else "right"
        style = {"textcoords": "offset points", "xycoords": ("data", "axes fraction"), "fontsize": LEGEND_SIZE}
        ax.annotate(name, (at, 1.0), (3 if side == "left" else -3, -2), va="top", ha=side, color="0.25", **style)
