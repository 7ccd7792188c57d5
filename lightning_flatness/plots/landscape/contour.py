"""The loss on a plane, as filled contours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.plots.landscape.common import (
    COLOURS,
    GAPS,
    axis_names,
    corner_counts,
    drawable_losses,
    gaps,
    has_contours,
    is_constant,
    masked,
    name_axis,
)
from lightning_flatness.results import LandscapeResult

TRAJECTORY_COLOUR = "#e4572e"
NUM_LEVELS = 24


def plot_contour(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    trajectory: Tensor | None = None,
    levels: Tensor | None = None,
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw the loss on a plane as filled contours, and the model as a cross.

    Cells at points without a finite loss are hatched grey, cells at points that were not computed are dotted. Levels
    are spaced evenly in the logarithm of the loss where the losses are positive and span more than a factor of ten.

    Args:
        result: a landscape with two axes.
        cap: draw losses above this value as this value, in units of the loss.
        trajectory: coordinates ``(points, 2)`` to join by a line, in order of time, from
            :func:`~lightning_flatness.pca_directions`. Points outside of the plane are cut off.
        levels: losses at which contours are drawn, ascending.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: matplotlib is missing, the result is a line or has no finite loss, ``cap`` is too low, or the
            trajectory has another shape or numbers that are not finite.

    Example:
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_contour(loss_landscape(torch.nn.Linear(2, 3), [batch], steps=5))
        >>> ax.get_xlabel()
        'random direction 1'
    """
    losses = drawable_losses(result, 2, "plot_contour", cap)
    figure, ax = axes_or_new(ax, 5.0, 4.0)
    x, y = result.coordinates
    levels = contour_levels(losses) if levels is None else levels
    handles = _draw_gaps(ax, result, gaps(result, losses))
    if has_contours(losses):
        beyond = cap is not None and bool((result.losses > cap).any())
        colours = {"cmap": COLOURS, "norm": _norm(levels), "extend": "max" if beyond else "neither"}
        filled = ax.contourf(x, y, masked(losses.T), levels=levels.tolist(), **colours)
        ax.contour(x, y, masked(losses.T), levels=levels[::3].tolist(), colors="white", linewidths=0.5, alpha=0.7)
        _draw_colour_bar(figure, ax, filled, levels, losses)
    else:
        finite = losses[losses.isfinite()]
        text = f"too few points for contours: {len(finite)} of {losses.numel()},\nlowest loss {float(finite.min()):.6g}"
        ax.text(0.5, 0.75, text, transform=ax.transAxes, ha="center", fontsize=8, bbox={"color": "white"})
    if trajectory is not None:
        handles += _draw_trajectory(ax, result, _checked_trajectory(trajectory))
    cross = {"marker": "x", "color": "black", "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none"}
    handles += ax.plot(0, 1.0 if result.update == "adam" else 0.0, label="model", **cross)
    if len(handles) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5, "frameon": False}
        ax.legend(handles=handles, ncols=len(handles), fontsize=7, handleheight=1.4, **below)
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.set_ylim(float(y[0]), float(y[-1]))
    names = axis_names(result)
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    return figure, ax


def contour_levels(losses: Tensor) -> Tensor:
    """Choose the losses at which contours are drawn: float64, ascending."""
    finite = losses[losses.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    if is_constant(losses):
        half = 0.5 * (abs(low) or 1.0)
        return torch.tensor([low - half, low + half], dtype=torch.float64, device="cpu")
    if _is_logarithmic(low, high):
        levels = torch.logspace(math.log10(low), math.log10(high), NUM_LEVELS, dtype=torch.float64)
        levels[0], levels[-1] = low, high  # to the last digit, so that every point lies between two levels
        return levels
    return torch.linspace(low, high, NUM_LEVELS, dtype=torch.float64, device="cpu")


def _is_logarithmic(low: float, high: float) -> bool:
    return low > 0 and high > 10 * low


def _norm(levels: Tensor) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(levels[0]), float(levels[-1])
    return LogNorm(low, high) if _is_logarithmic(low, high) else Normalize(low, high)


def _draw_gaps(ax: Any, result: LandscapeResult, masks: dict[str, Tensor]) -> list[Any]:
    """Hatch every cell that has a corner in a gap; return handles for a legend."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    drawn = torch.zeros_like(corner_counts(result.computed), dtype=torch.bool)
    for reason, points in masks.items():
        style = GAPS[reason]
        cells = (corner_counts(points) > 0) & ~drawn
        drawn |= cells
        ax.pcolor(
            *(axis.numpy() for axis in result.coordinates),
            np.ma.masked_equal(cells.T.numpy(), 0),
            cmap=ListedColormap([style["facecolor"]]),
            linewidth=0,
            hatch=style["hatch"],
            edgecolor=style["edgecolor"],
        )
    return [Patch(label=reason, linewidth=0, **GAPS[reason]) for reason in masks]


def _checked_trajectory(trajectory: Any) -> Tensor:
    points = torch.as_tensor(trajectory, device="cpu")
    if points.ndim != 2 or points.shape[1] != 2 or not bool(points.isfinite().all()):
        raise FlatnessError(f"trajectory has shape {tuple(points.shape)}; give finite coordinates (points, 2).")
    return points


def _draw_trajectory(ax: Any, result: LandscapeResult, points: Tensor) -> list[Any]:
    """Draw a line, and mark its first and last point; return handles for a legend."""
    ax.plot(points[:, 0], points[:, 1], color=TRAJECTORY_COLOUR, marker="o", markersize=2.5, linewidth=1.2)
    handles = []
    for label, point, inner in (("start", points[0], "white"), ("end", points[-1], TRAJECTORY_COLOUR)):
        style = {"marker": "o", "markersize": 9, "markerfacecolor": inner, "markeredgecolor": "black"}
        (marker,) = ax.plot(*point.tolist(), linestyle="none", markeredgewidth=0.8, label=label, **style)
        if all(axis[0] <= at <= axis[-1] for axis, at in zip(result.coordinates, point, strict=True)):
            handles.append(marker)
    return handles


def _draw_colour_bar(figure: Any, ax: Any, filled: Any, levels: Tensor, losses: Tensor) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    form = None
    if len(levels) == 2 and is_constant(losses):
        ticks, form = [float(levels.mean())], "%.6g"
    elif isinstance(filled.norm, LogNorm):
        ticks = levels[:: max(1, (len(levels) - 1) // 6)].tolist()
        digits = next(n for n in range(3, 18) if n == 17 or len({f"{tick:.{n}g}" for tick in ticks}) == len(ticks))
        form = f"%.{digits}g"  # the fewest digits that tell the ticks apart
    else:
        low, high = float(levels[0]), float(levels[-1])
        candidates = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ticks = [float(tick) for tick in candidates if low <= tick <= high]  # matplotlib moves others to the ends
    bar = figure.colorbar(filled, ax=ax, ticks=ticks, format=form)
    bar.minorticks_off()
    name_axis(bar.ax.yaxis, "loss")
