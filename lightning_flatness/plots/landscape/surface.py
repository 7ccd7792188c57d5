"""The loss on a plane, as a surface in three dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.plots.landscape.common import (
    COLOURS,
    axis_names,
    drawable_losses,
    gaps,
    has_contours,
    is_constant,
    masked,
    name_axis,
)
from lightning_flatness.results import LandscapeResult

NUM_FACETS = 20


def plot_surface(
    result: LandscapeResult, *, cap: float | None = None, log: bool = False, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw the loss on a plane as a surface, with its contours below.

    Points without a finite loss, or not computed, leave holes; the figure counts them.

    Args:
        result: a landscape with two axes.
        cap: draw losses above this value as this value, in units of the loss. A steep surface needs it, or ``log``.
        log: draw the decimal logarithm of the loss.
        ax: axes with ``projection="3d"`` to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: matplotlib is missing, the result is a line or has no finite loss, ``cap`` is too low, or
            ``log`` is set and a loss is not positive.

    Example:
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_surface(loss_landscape(torch.nn.Linear(2, 3), [batch], steps=5))
        >>> ax.get_zlabel()
        'loss'
    """
    losses = drawable_losses(result, 2, "plot_surface", cap)
    if log and not bool((losses[losses.isfinite()] > 0).all()):
        raise FlatnessError("log=True draws the logarithm of the loss, but some losses are not positive.")
    heights = losses.log10() if log else losses
    figure, ax = axes_or_new(ax, 5.4, 4.4, subplot_kw={"projection": "3d"})
    finite = heights[heights.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    height = high - low or 1.0
    # Every facet has one colour, so facets are interpolated where there are few points.
    parts = [max(1, NUM_FACETS // (len(axis) - 1)) for axis in result.coordinates]
    x, y = torch.meshgrid(*map(_refined, result.coordinates, parts), indexing="ij")
    drawn = _refined(_refined(torch.where(heights.isfinite(), heights, math.nan), parts[0]).T, parts[1]).T
    ax.plot_surface(
        x.numpy(), y.numpy(), drawn.numpy(), cmap=COLOURS, vmin=low, vmax=high, rcount=200, ccount=200, linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    floor = low - 0.35 * height
    flat = is_constant(heights)
    if not flat and has_contours(heights):
        x, y = torch.meshgrid(*result.coordinates, indexing="ij")
        below = {"zdir": "z", "offset": floor, "cmap": COLOURS, "linewidths": 0.8}
        ax.contour(x.numpy(), y.numpy(), masked(heights), levels=12, **below)
    ax.set_zlim(floor, high)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    ax.yaxis.get_major_locator().set_params(nbins=5)
    ax.set_zticks([low] if flat else [tick for tick in ax.get_zticks() if low - 0.05 * height <= tick <= high])
    axes = (ax.xaxis, ax.yaxis, ax.zaxis)
    for axis, name in zip(axes, [*axis_names(result), "log₁₀ loss" if log else "loss"], strict=True):
        name_axis(axis, name)
        axis.pane.set_facecolor((1, 1, 1, 0))
        axis.set_tick_params(labelsize=8)
    holes = [f"{int(points.sum())} {reason}" for reason, points in gaps(result, losses).items()]
    if holes:
        text = f"holes: {', '.join(holes)}, of {losses.numel()} points"
        ax.text2D(0.02, 0.95, text, transform=ax.transAxes, fontsize=8)
    ax.view_init(elev=28, azim=-55)
    ax.set_box_aspect((1, 1, 0.75), zoom=0.88)
    return figure, ax


def _refined(values: Tensor, parts: int) -> Tensor:
    """Interpolate linearly along the first dimension, ``parts`` intervals for each; gaps do not grow.

    Example:
        >>> _refined(torch.tensor([math.nan, 1.0, 3.0]), 2)
        tensor([nan, nan, 1., 2., 3.])
    """
    where = torch.arange(parts, dtype=values.dtype, device="cpu").reshape(-1, *[1] * (values.ndim - 1)) / parts
    start = values[:-1, None]
    between = torch.where(where > 0, start + (values[1:, None] - start) * where, start)
    return torch.cat([between.flatten(0, 1), values[-1:]])
