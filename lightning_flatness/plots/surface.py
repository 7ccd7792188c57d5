"""Draw the loss on a plane as a surface in three dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, set_heading, short
from lightning_flatness.plots.landscape import (
    COLOURS,
    axis_names,
    draw_colour_bar,
    drawable_losses,
    gaps,
    has_contours,
    heading,
    is_constant,
    is_logarithmic,
    masked,
    name_axis,
    round_losses,
)
from lightning_flatness.results import LandscapeResult

NUM_FACETS = 20


def plot_surface(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    log: bool = False,
    label: str | None = None,
    data: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the loss on a plane as a surface, with contours below it.

    Points that were not computed, or whose loss is infinite or NaN, leave holes in the surface; the figure states the
    number of these points. A steep surface is readable only with ``cap`` or ``log``.

    Args:
        result: a landscape with two axes.
        cap: draw losses above ``cap``, even infinite losses, as if they were ``cap``.
        log: draw the logarithm of the loss; all losses must be positive.
        label: name of the plane, for the title.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into, with ``projection="3d"``.

    Returns:
        The figure and its axes, with ``projection="3d"``.

    Raises:
        FlatnessError: the result does not have two axes, it has no finite loss, ``cap`` is not above the lowest loss,
            ``log`` is True and a loss is not positive, or matplotlib is missing.

    Source:
        Li et al. 2018 (arXiv 1712.09913).

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, ax = plot_surface(loss_landscape(net, [batch], steps=5))
        >>> ax.name
        '3d'
    """
    losses = drawable_losses(result, 2, "plot_surface", cap)
    if log and not bool((losses[losses.isfinite()] > 0).all()):
        raise FlatnessError("log=True draws the logarithm of the loss, but some losses are not positive.")
    heights = losses.log10() if log else losses
    figure, ax = axes_or_new(ax, 5.8, 4.6, subplot_kw={"projection": "3d"})
    finite = heights[heights.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    floor = low - 0.35 * (high - low or 1.0)
    surface = _draw_facets(ax, result, heights, low, high)
    flat = is_constant(heights)
    if not flat and has_contours(heights):
        x, y = torch.meshgrid(*result.coordinates, indexing="ij")
        below = {"zdir": "z", "offset": floor, "cmap": COLOURS, "linewidths": 0.8}
        ax.contour(x.numpy(), y.numpy(), masked(heights), levels=12, **below)
    ax.set_zlim(floor, high)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    ax.yaxis.get_major_locator().set_params(nbins=5)
    ticks = [low] if flat else _ticks(low, high, log)
    form = _as_losses() if log else None
    ax.set_zticks(ticks)
    for axis, name in zip((ax.xaxis, ax.yaxis, ax.zaxis), [*axis_names(result), "loss"], strict=True):
        if axis is ax.zaxis and form is not None:
            axis.set_major_formatter(form)
        name_axis(axis, name)
        axis.pane.set_facecolor((1, 1, 1, 0))
        axis.set_tick_params(labelsize=8)
    set_heading(ax, *heading(result, data, label))  # before the colour bar makes the axes narrower
    draw_colour_bar(figure, {"ax": ax, "shrink": 0.6, "pad": 0.2, "aspect": 16}, surface, ticks, form)
    holes = [f"{int(points.sum())} {reason}" for reason, points in gaps(result, losses).items()]
    if holes:
        text = f"holes: {', '.join(holes)}, of {losses.numel()} points"
        ax.text2D(0.02, 0.95, text, transform=ax.transAxes, fontsize=8)
    ax.view_init(elev=28, azim=-55)
    ax.set_box_aspect((1, 1, 0.75), zoom=0.88)
    return figure, ax


def _draw_facets(ax: Any, result: LandscapeResult, heights: Tensor, low: float, high: float) -> Any:
    """Draw the surface and return its artist. A coarse grid is interpolated, because a facet has only one colour."""
    parts = [max(1, NUM_FACETS // (len(axis) - 1)) for axis in result.coordinates]
    x, y = torch.meshgrid(*map(_refined, result.coordinates, parts), indexing="ij")
    drawn = _refined(_refined(torch.where(heights.isfinite(), heights, math.nan), parts[0]).T, parts[1]).T
    return ax.plot_surface(
        x.numpy(), y.numpy(), drawn.numpy(), cmap=COLOURS, vmin=low, vmax=high, rcount=200, ccount=200,
        linewidth=0.15, edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip


def _as_losses() -> Any:
    """Return a tick formatter that turns the decimal logarithm of a loss into the loss."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: short(float(f"{10**value:.3g}")))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return the ticks at round losses; with ``log``, the bounds and the ticks are decimal logarithms of losses."""
    if not log:
        return round_losses(low, high, False)
    losses = round_losses(10**low, 10**high, is_logarithmic(10**low, 10**high))
    return [math.log10(loss) for loss in losses]


def _refined(values: Tensor, parts: int) -> Tensor:
    """Divide every interval between neighbours along the first dimension into ``parts`` parts by linear interpolation.

    The result contains the given values unchanged, even a finite value beside a NaN.
    """
    where = torch.arange(parts, dtype=values.dtype, device="cpu").reshape(-1, *[1] * (values.ndim - 1)) / parts
    start = values[:-1, None]
    between = torch.where(where > 0, start + (values[1:, None] - start) * where, start)
    return torch.cat([between.flatten(0, 1), values[-1:]])
