"""What the figures of landscapes share: losses to draw, gaps, titles, names of axes, colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import round_numbers, short
from lightning_flatness.plots.words import samples_of
from lightning_flatness.results import LandscapeResult

COLOURS = "viridis"
# Style of points that have no loss to draw, by reason.
GAPS: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": "#d9d9d9", "hatch": "///", "edgecolor": "white"},
    "not computed": {"facecolor": "white", "hatch": "...", "edgecolor": "#c4c4c4"},
}


def drawable_losses(result: LandscapeResult, num_axes: int, figure: str, cap: float | None = None) -> Tensor:
    """Return the losses, at most ``cap``; raise an error for a wrong number of axes or if no loss is finite."""
    if not isinstance(result, LandscapeResult) or len(result.axes) != num_axes:
        given = f"{len(result.axes)} axes" if isinstance(result, LandscapeResult) else type(result).__name__
        raise FlatnessError(f"{figure} draws a LandscapeResult with {num_axes} coordinate axes; this one has {given}.")
    losses = result.losses
    if not bool(result.finite.any()):
        raise FlatnessError("The landscape has no finite loss, so there is nothing to draw.")
    if cap is None:
        return losses
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > float(losses[result.finite].min()):
        raise FlatnessError(f"{cap=} must be a number above the lowest loss.")
    return torch.where(losses > cap, torch.full_like(losses, cap), losses)


def gaps(result: LandscapeResult, losses: Tensor) -> dict[str, Tensor]:
    """Return boolean masks of the points that have no loss to draw, one for each reason that occurs."""
    masks = {"not finite": result.computed & ~losses.isfinite(), "not computed": ~result.computed}
    return {reason: points for reason, points in masks.items() if bool(points.any())}


def corner_counts(points: Tensor) -> Tensor:
    """Count the marked corners of every cell of a grid, ``(n - 1, m - 1)``, from marked points ``(n, m)``."""
    edges = points[1:].int() + points[:-1].int()
    return edges[:, 1:] + edges[:, :-1]


def has_contours(losses: Tensor) -> bool:
    """Return whether some cell has at least three finite corners, which a contour needs."""
    return bool((corner_counts(losses.isfinite()) >= 3).any())


def is_constant(losses: Tensor) -> bool:
    """Return whether all finite losses are equal up to rounding."""
    finite = losses[losses.isfinite()]
    return float(finite.max() - finite.min()) <= 1e-12 * float(finite.abs().max())


def masked(losses: Tensor) -> Any:
    """Return the losses as a numpy array in which losses that are not finite are masked."""
    import numpy as np

    return np.ma.masked_invalid(losses.numpy())


def axis_names(result: LandscapeResult) -> list[str]:
    """Return a name for every coordinate axis."""
    if result.update == "adam":
        return ["α: steps of Adam, as learning rate", "β: factor of the second moment"]
    return list(result.axes)


def name_axis(axis: Any, text: str) -> None:
    """Label an axis of the figure; a common factor or offset of its numbers is written into the label."""
    formatter = axis.get_major_formatter()
    formatter.format_ticks(axis.get_majorticklocs())
    offset = formatter.get_offset()  # such as "1e-9+9.89e-1"
    if offset:
        text += f"\n({'× ' if offset[0].isdigit() else ''}{offset.replace('+', ' + ').strip()})"
        axis.labelpad += 8
    axis.set_label_text(text)
    axis.get_offset_text().set_visible(False)


def heading(result: LandscapeResult, data: str | None, label: str | None = None) -> tuple[str, str, str]:
    """Return lines for the title: a name, the samples, and how the directions and BatchNorm were treated."""
    if result.update == "adam":
        scale = "updates of Adam"
    elif result.normalize == "none":
        scale = "directions not normalised"
    else:
        scale = f"normalised by {result.normalize} (L{result.norm})"
    return (
        label or "",
        f"{result.loss}, mean over {samples_of(result.num_samples, data)}",
        f"{scale}; BatchNorm statistics {result.batch_norm}",
    )


def is_logarithmic(low: float, high: float) -> bool:
    """Return whether losses are drawn on a logarithmic scale: they are positive and span more than a factor of ten."""
    return low > 0 and high > 10 * low


def round_losses(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return round losses between two bounds, for ticks and for lines of equal loss."""
    from matplotlib.ticker import MaxNLocator

    if logarithmic:
        return round_numbers(low, high)
    candidates = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in candidates if low <= tick <= high]


def draw_colour_bar(figure: Any, bar_axes: dict[str, Any], filled: Any, ticks: list[float], form: Any = None) -> Any:
    """Draw the colour bar of losses, with labels of few digits, into axes ``cax`` or beside axes ``ax``."""
    from matplotlib.colors import LogNorm

    if form is None and isinstance(filled.norm, LogNorm):
        form = lambda value, _: short(value)  # noqa: E731
    bar = figure.colorbar(filled, ticks=ticks, format=form, **bar_axes)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    name_axis(bar.ax.yaxis, "loss")
    return bar
