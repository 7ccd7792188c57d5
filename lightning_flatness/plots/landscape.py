"""Figures of loss landscapes: a curve for a line, contours or a surface for a plane, and two landscapes compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.results import LandscapeResult

COLOURS = "viridis"
# Style of points that have no loss to draw, by reason.
GAPS: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": "#d9d9d9", "hatch": "///", "edgecolor": "white"},
    "not computed": {"facecolor": "white", "hatch": "...", "edgecolor": "#c4c4c4"},
}
LOSS_COLOUR, ACCURACY_COLOUR = "#1f4e9c", "#c8641e"
TRAJECTORY_COLOUR = "#e4572e"
NUM_LEVELS = 24
NUM_FACETS = 20


def plot_line(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    accuracy: bool = True,
    label: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the loss along a line, and, unless ``accuracy`` is False, the accuracy in percent on a second vertical axis.

    Points without a finite loss are drawn as hatched grey bands, and points that were not computed as dotted bands. To
    compare lines, draw them into the same ``ax`` with a ``label`` each; the accuracy is then not drawn.
    """
    losses = drawable_losses(result, 1, "plot_line", cap)
    figure, ax = axes_or_new(ax, 5.2, 3.6)
    (x,) = result.coordinates
    colour = LOSS_COLOUR if label is None else None
    ax.plot(x, losses, color=colour, marker="o", markersize=2.5, linewidth=1.5, label=label)
    ax.set(xlabel=axis_names(result)[0], ylabel="loss")
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


def plot_contour(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    trajectory: Tensor | None = None,
    levels: Tensor | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the loss on a plane as filled contours, and the model as a cross.

    Cells at points without a finite loss are hatched grey, and cells at points that were not computed are dotted.
    ``levels`` are the losses of the contours, ascending. By default they are evenly spaced, in the logarithm of the
    loss if the losses are positive and span more than a factor of ten. ``trajectory`` has coordinates ``(points, 2)``
    in order of time, from :func:`~lightning_flatness.pca_directions`; it is drawn as a line, clipped to the plane.
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
        handles += _draw_trajectory(ax, result, trajectory)
    cross = {"marker": "x", "color": "black", "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none"}
    handles += ax.plot(0, 1.0 if result.update == "adam" else 0.0, label="model", **cross)
    if len(handles) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5, "frameon": False}
        ax.legend(handles=handles, ncols=len(handles), fontsize=7, handleheight=1.4, **below)
    ax.set(xlim=(float(x[0]), float(x[-1])), ylim=(float(y[0]), float(y[-1])))
    ax.set(**dict(zip(("xlabel", "ylabel"), axis_names(result), strict=True)))
    return figure, ax


def contour_levels(losses: Tensor) -> Tensor:
    """Return the losses at which contours are drawn, float64, ascending."""
    finite = losses[losses.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    if is_constant(losses):
        half = 0.5 * (abs(low) or 1.0)
        return torch.tensor([low - half, low + half], dtype=torch.float64, device="cpu")
    if _is_logarithmic(low, high):
        levels = torch.logspace(math.log10(low), math.log10(high), NUM_LEVELS, dtype=torch.float64, device="cpu")
        levels[0], levels[-1] = low, high  # exact, so that every point lies between two levels
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


def _draw_trajectory(ax: Any, result: LandscapeResult, trajectory: Any) -> list[Any]:
    """Draw a line, and mark its first and last point; return handles for a legend."""
    points = torch.as_tensor(trajectory, device="cpu")
    if points.ndim != 2 or points.shape[1] != 2 or not bool(points.isfinite().all()):
        raise FlatnessError(f"trajectory has shape {tuple(points.shape)}; give finite coordinates (points, 2).")
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


def plot_kept_and_recomputed(
    kept: LandscapeResult, recomputed: LandscapeResult, *, cap: float | None = None
) -> tuple[Any, Any]:
    """Compare a landscape with the model's BatchNorm statistics and one with statistics recomputed at every point.

    Lines are drawn into the same axes. Planes are drawn side by side with equal colours, and two axes are returned.
    """
    pair = (kept, recomputed)
    same_points = len(kept.axes) == len(recomputed.axes) and all(
        torch.equal(*axes) for axes in zip(kept.coordinates, recomputed.coordinates, strict=True)
    )
    if [result.batch_norm for result in pair] != ["kept", "recomputed"] or not same_points:
        raise FlatnessError(
            "Give a landscape with batch_norm='kept' and one with 'recomputed', in this order, at the same points; "
            f"these are '{kept.batch_norm}' and '{recomputed.batch_norm}'."
        )
    if len(kept.axes) == 1:
        figure, ax = axes_or_new(None, 5.2, 3.6)
        for result in pair:
            plot_line(result, cap=cap, accuracy=False, label=f"statistics {result.batch_norm}", ax=ax)
        ax.legend(frameon=False)
        return figure, ax
    losses = [drawable_losses(result, 2, "plot_kept_and_recomputed", cap).flatten() for result in pair]
    levels = contour_levels(torch.cat(losses))
    figure, axes = axes_or_new(None, 9.2, 3.9, ncols=2)
    for ax, result in zip(axes, pair, strict=True):
        plot_contour(result, cap=cap, levels=levels, ax=ax)
        ax.set_title(f"BatchNorm statistics {result.batch_norm}", fontsize=10)
    return figure, axes


def plot_surface(
    result: LandscapeResult, *, cap: float | None = None, log: bool = False, ax: Any = None
) -> tuple[Any, Any]:
    """Draw the loss on a plane, or with ``log`` its decimal logarithm, as a surface, with its contours below.

    Points that have no finite loss or were not computed leave holes, and the figure states their number. A steep
    surface needs ``cap`` or ``log``. If ``ax`` is given, it must have ``projection="3d"``.
    """
    losses = drawable_losses(result, 2, "plot_surface", cap)
    if log and not bool((losses[losses.isfinite()] > 0).all()):
        raise FlatnessError("log=True draws the logarithm of the loss, but some losses are not positive.")
    heights = losses.log10() if log else losses
    figure, ax = axes_or_new(ax, 5.4, 4.4, subplot_kw={"projection": "3d"})
    finite = heights[heights.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    height = high - low or 1.0
    # Every facet of the surface has one colour, so a coarse grid is interpolated to get more facets.
    parts = [max(1, NUM_FACETS // (len(axis) - 1)) for axis in result.coordinates]
    x, y = torch.meshgrid(*map(_refined, result.coordinates, parts), indexing="ij")
    drawn = _refined(_refined(torch.where(heights.isfinite(), heights, math.nan), parts[0]).T, parts[1]).T
    ax.plot_surface(
        x.numpy(), y.numpy(), drawn.numpy(), cmap=COLOURS, vmin=low, vmax=high, rcount=200, ccount=200,
        linewidth=0.15, edgecolor=(1, 1, 1, 0.35), antialiased=True,
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
    """Divide every interval of the first dimension into ``parts`` by linear interpolation; gaps do not grow."""
    where = torch.arange(parts, dtype=values.dtype, device="cpu").reshape(-1, *[1] * (values.ndim - 1)) / parts
    start = values[:-1, None]
    between = torch.where(where > 0, start + (values[1:, None] - start) * where, start)
    return torch.cat([between.flatten(0, 1), values[-1:]])


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
