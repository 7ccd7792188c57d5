"""What all figures of a landscape share: which losses are drawn, where there are none, and the names of the axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results import LandscapeResult

COLOURS = "viridis"
# How points without a loss are drawn, by reason.
GAPS: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": "#d9d9d9", "hatch": "///", "edgecolor": "white"},
    "not computed": {"facecolor": "white", "hatch": "...", "edgecolor": "#c4c4c4"},
}


def drawable_losses(result: LandscapeResult, num_axes: int, figure: str, cap: float | None = None) -> Tensor:
    """Return the losses of a landscape, those above ``cap`` replaced by it.

    Args:
        result: the landscape.
        num_axes: how many axes the figure needs.
        figure: name of the plotting function, for the error message.
        cap: in units of the loss; None to keep all losses.

    Raises:
        FlatnessError: ``result`` has another number of axes or no finite loss, or ``cap`` is too low.
    """
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
    """Mark the points without a loss to draw: one boolean mask for each reason that occurs."""
    masks = {"not finite": result.computed & ~losses.isfinite(), "not computed": ~result.computed}
    return {reason: points for reason, points in masks.items() if bool(points.any())}


def corner_counts(points: Tensor) -> Tensor:
    """Count for every cell of a grid how many of its four corners are marked: ``(n, m)`` to ``(n - 1, m - 1)``."""
    edges = points[1:].int() + points[:-1].int()
    return edges[:, 1:] + edges[:, :-1]


def has_contours(losses: Tensor) -> bool:
    """Whether some cell has three finite corners, the fewest between which a contour can be drawn."""
    return bool((corner_counts(losses.isfinite()) >= 3).any())


def is_constant(losses: Tensor) -> bool:
    """Whether all finite losses are equal up to rounding."""
    finite = losses[losses.isfinite()]
    return float(finite.max() - finite.min()) <= 1e-12 * float(finite.abs().max())


def masked(losses: Tensor) -> Any:
    """Convert to a numpy array in which losses that are not finite are masked."""
    import numpy as np

    return np.ma.masked_invalid(losses.numpy())


def axis_names(result: LandscapeResult) -> list[str]:
    """Name every coordinate axis."""
    if result.update == "adam":
        return ["α: steps of Adam, as learning rate", "β: factor of the second moment"]
    return list(result.axes)


def name_axis(axis: Any, text: str) -> None:
    """Name an axis of the figure; a common factor or offset of its numbers goes into the name, where there is room."""
    formatter = axis.get_major_formatter()
    formatter.format_ticks(axis.get_majorticklocs())
    offset = formatter.get_offset()  # such as "1e-9+9.89e-1"
    if offset:
        text += f"\n({'× ' if offset[0].isdigit() else ''}{offset.replace('+', ' + ').strip()})"
        axis.labelpad += 8
    axis.set_label_text(text)
    axis.get_offset_text().set_visible(False)
