"""The loss along a line."""

from __future__ import annotations

from typing import Any

from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.plots.landscape.common import GAPS, axis_names, drawable_losses, gaps
from lightning_flatness.results import LandscapeResult

LOSS_COLOUR, ACCURACY_COLOUR = "#1f4e9c", "#c8641e"


def plot_line(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    accuracy: bool = True,
    label: str | None = None,
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw the loss along a line, and the accuracy in percent on a second vertical axis.

    Points without a finite loss are drawn as hatched grey bands, points that were not computed as dotted bands.

    Args:
        result: a landscape with one axis.
        cap: draw losses above this value as this value, in units of the loss.
        accuracy: draw the accuracy, if there is one.
        label: of the curve in a legend, without accuracy. To compare lines, draw them into the same ``ax``.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: matplotlib is missing, the result is a plane or has no finite loss, or ``cap`` is too low.

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_line(loss_landscape(torch.nn.Linear(2, 3), [batch], axes=["random"], steps=5))
        >>> ax.get_ylabel()
        'loss'
    """
    losses = drawable_losses(result, 1, "plot_line", cap)
    figure, ax = axes_or_new(ax, 5.2, 3.6)
    (x,) = result.coordinates
    colour = LOSS_COLOUR if label is None else None
    ax.plot(x, losses, color=colour, marker="o", markersize=2.5, linewidth=1.5, label=label)
    ax.set_xlabel(axis_names(result)[0])
    ax.set_ylabel("loss")
    ax.axvline(0, color="black", linewidth=0.6, alpha=0.5)
    ax.margins(x=0)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    half = float(x[1] - x[0]) / 2
    for reason, points in gaps(result, result.losses).items():
        for missing in x[points].tolist():
            low, high = max(missing - half, float(x[0])), min(missing + half, float(x[-1]))
            labelled = ax.get_legend_handles_labels()[1]
            ax.axvspan(low, high, linewidth=0, label=None if reason in labelled else reason, **GAPS[reason])
    if label is None and not result.finite.all():
        ax.legend(fontsize=8)
    if accuracy and result.accuracies is not None and label is None:
        right = ax.twinx()
        right.plot(x, 100 * result.accuracies, color=ACCURACY_COLOUR, linewidth=1.2, linestyle="--")
        right.set_ylabel("accuracy (%)", color=ACCURACY_COLOUR)
        right.tick_params(axis="y", colors=ACCURACY_COLOUR)
        right.set_ylim(0, 102)
        ax.yaxis.label.set_color(LOSS_COLOUR)
        ax.tick_params(axis="y", colors=LOSS_COLOUR)
    return figure, ax
