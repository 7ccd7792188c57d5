"""What all figures of landscapes share: losses to draw, points without a loss, titles, axis labels, colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import round_numbers, short
from lightning_flatness.results import LandscapeResult
from lightning_flatness.results.texts import samples_of

COLOURS = "viridis"
AXES = {1: "one axis", 2: "two axes"}
# The style of points without a loss, for each reason why they have none.
GAPS: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": "#d9d9d9", "hatch": "///", "edgecolor": "white"},
    "not computed": {"facecolor": "white", "hatch": "...", "edgecolor": "#c4c4c4"},
}


def drawable_losses(result: LandscapeResult, num_axes: int, function: str, cap: float | None = None) -> Tensor:
    """Return the losses of a landscape, with ``cap`` in place of larger losses.

    Raise an error unless the landscape has ``num_axes`` axes and a finite loss. Raise an error too if ``cap`` is given
    but not above the lowest loss. ``function`` is the name of the plotting function, for the error message.
    """
    if not isinstance(result, LandscapeResult) or len(result.axes) != num_axes:
        is_landscape = isinstance(result, LandscapeResult)
        given = f"this one has {AXES[len(result.axes)]}" if is_landscape else f"this is a {type(result).__name__}"
        kind = {1: "line", 2: "plane"}[num_axes]
        raise FlatnessError(f"{function} needs a landscape on a {kind} ({AXES[num_axes]}); {given}.")
    losses = result.losses
    if not bool(result.finite.any()):
        raise FlatnessError("The landscape has no finite loss, so there is nothing to draw.")
    if cap is None:
        return losses
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > float(losses[result.finite].min()):
        raise FlatnessError(f"{cap=} must be a number above the lowest loss.")
    return torch.where(losses > cap, torch.full_like(losses, cap), losses)


def gaps(result: LandscapeResult, losses: Tensor) -> dict[str, Tensor]:
    """Return masks of the points without a finite loss, as a dict from reasons to boolean masks.

    The reasons are ``"not finite"`` (infinite or NaN in ``losses``) and ``"not computed"``. A reason without points is
    left out.
    """
    masks = {"not finite": result.computed & ~losses.isfinite(), "not computed": ~result.computed}
    return {reason: points for reason, points in masks.items() if bool(points.any())}


def corner_counts(points: Tensor) -> Tensor:
    """Return for every cell of a grid how many of its four corners are true in the mask ``points``.

    ``points`` has shape ``(n, m)``, one entry for each grid point. The result has shape ``(n - 1, m - 1)``.
    """
    edges = points[1:].int() + points[:-1].int()
    return edges[:, 1:] + edges[:, :-1]


def has_contours(losses: Tensor) -> bool:
    """Return whether contours can be drawn: at least one grid cell must have three finite corners."""
    return bool((corner_counts(losses.isfinite()) >= 3).any())


def is_constant(losses: Tensor) -> bool:
    """Return whether all finite losses are equal up to rounding."""
    finite = losses[losses.isfinite()]
    return float(finite.max() - finite.min()) <= 1e-12 * float(finite.abs().max())


def masked(losses: Tensor) -> Any:
    """Return the losses as a masked numpy array; losses that are not finite are masked."""
    import numpy as np

    return np.ma.masked_invalid(losses.numpy())


def axis_names(result: LandscapeResult) -> list[str]:
    """Return the names of the coordinate axes, for labels."""
    if result.update == "adam":
        return ["α: steps of Adam, as learning rate", "β: factor of the second moment"]
    return list(result.axes)


def name_axis(axis: Any, text: str) -> None:
    """Label an axis of the figure, and move matplotlib's common factor or offset of the ticks into the label."""
    formatter = axis.get_major_formatter()
    formatter.format_ticks(axis.get_majorticklocs())
    offset = formatter.get_offset()  # such as "1e-9+9.89e-1"
    if offset:
        text += f"\n({'× ' if offset[0].isdigit() else ''}{offset.replace('+', ' + ').strip()})"
        axis.labelpad += 8
    axis.set_label_text(text)
    axis.get_offset_text().set_visible(False)


def heading(result: LandscapeResult, data: str | None, label: str | None = None) -> tuple[str, str, str]:
    """Return three lines for the title: one with ``label``, one on loss and samples, one on scale and BatchNorm."""
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
    """Return whether losses from ``low`` to ``high`` are positive and span more than a factor of ten."""
    return low > 0 and high > 10 * low


def round_losses(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return round losses between two bounds, for ticks and for lines of equal loss."""
    from matplotlib.ticker import MaxNLocator

    if logarithmic:
        return round_numbers(low, high)
    candidates = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in candidates if low <= tick <= high]


def draw_colour_bar(figure: Any, bar_axes: dict[str, Any], filled: Any, ticks: list[float], form: Any = None) -> None:
    """Draw the colour bar of losses; ``bar_axes`` holds arguments of ``figure.colorbar`` that set the bar's place."""
    from matplotlib.colors import LogNorm

    if form is None and isinstance(filled.norm, LogNorm):
        form = lambda value, _: short(value)  # noqa: E731
    bar = figure.colorbar(filled, ticks=ticks, format=form, **bar_axes)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    name_axis(bar.ax.yaxis, "loss")
