"""Draw the loss on planes as contours. Several planes can be drawn into the same axes, and two planes side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import SERIES, axes_or_new, overlays, set_heading, set_joint_heading, short
from lightning_flatness.plots.landscape import (
    COLOURS,
    GAPS,
    axis_names,
    corner_counts,
    draw_colour_bar,
    drawable_losses,
    gaps,
    has_contours,
    heading,
    is_constant,
    is_logarithmic,
    masked,
    round_losses,
)
from lightning_flatness.plots.line import plot_line
from lightning_flatness.results import SETTINGS, LandscapeResult

END_COLOUR = SERIES[1]
NUM_LEVELS = 24
# Several planes in the same axes have different strokes, so that they differ in a print without colours.
STROKES = ("solid", "dashed", "dotted", "dashdot")
# A plane is not drawn to scale if one side is more than this many times as long as the other.
MOST_ELONGATED = 3.0


def plot_contour(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    trajectory: Tensor | None = None,
    levels: Tensor | None = None,
    label: str | None = None,
    color: Any = None,
    data: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the loss on a plane as filled contours, or as lines if ``color`` is given; a cross marks the model.

    The cells of the grid around a point with an infinite or NaN loss are hatched grey. The cells around a point that
    was not computed are dotted. Both axes have the same scale, unless their units differ (with ``update="adam"``) or
    one side of the plane is more than three times as long as the other.

    Args:
        result: a landscape with two axes.
        cap: draw losses above ``cap``, even infinite losses, as if they were ``cap``.
        trajectory: coordinates of training steps, ``(points, 2)``, in order of time, from
            :func:`~lightning_flatness.pca_directions`. They are drawn as a line; parts outside the plane are not shown.
        levels: losses at which filled contours change colour, ascending. By default they are evenly spaced in the loss,
            or in its logarithm if the losses are positive and span more than a factor of ten. If ``color`` is given,
            the lines are at round losses between the first and the last level. To compare planes, give all of them the
            same levels, such as those of :func:`shared_levels`.
        label: name of the plane, for the title, or for the legend if ``color`` is given.
        color: draw lines of equal loss in this colour instead of filled contours, with the losses written on the
            lines. To compare planes, draw them into the same ``ax``, each with its own ``color`` and ``label``.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: the result does not have two axes, it has no finite loss, ``cap`` is not above the lowest loss,
            ``trajectory`` has a wrong shape or numbers that are not finite, or matplotlib is missing.

    Source:
        Li et al. 2018 (arXiv 1712.09913).

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, ax = plot_contour(loss_landscape(net, [batch], steps=5))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('random direction 1', 'random direction 2')
    """
    losses = drawable_losses(result, 2, "plot_contour", cap)
    x, y = result.coordinates
    ratio = _ratio(result)
    figure, ax = axes_or_new(ax, 5.4, 1.5 + 3.7 * min(max(ratio or 0.8, 0.4), 1.3))
    levels = contour_levels(losses) if levels is None else levels
    curve = None
    handles = overlays(ax, "plane")
    handles += _draw_gaps(ax, result, gaps(result, losses))
    if not has_contours(losses):
        finite = losses[losses.isfinite()]
        text = f"too few points for contours: {len(finite)} of {losses.numel()},\nlowest loss {float(finite.min()):.6g}"
        ax.text(0.5, 0.75, text, transform=ax.transAxes, ha="center", fontsize=8, bbox={"color": "white"})
    elif color is not None:
        curve = _draw_lines(ax, result, losses, levels, color, label)
        handles.append(curve)
    else:
        beyond = cap is not None and bool((result.losses > cap).any())
        _draw_filled(figure, ax, result, losses, levels, "max" if beyond else "neither")
    if trajectory is not None:
        handles += _draw_trajectory(ax, result, trajectory)
    cross = {"marker": "x", "color": "black", "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none"}
    handles += ax.plot(0, 1.0 if result.update == "adam" else 0.0, label="model", **cross)
    handles = list({handle.get_label(): handle for handle in handles}.values())
    if len(handles) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5, "frameon": False}
        ax.legend(handles=handles, ncols=len(handles), fontsize=7, handleheight=1.4, **below)
    _set_limits(ax, x, y, is_overlay=bool(overlays(ax, "plane")))
    if curve is not None:
        set_joint_heading(ax, "plane", curve, *heading(result, data))
    else:
        set_heading(ax, *heading(result, data, label))
    if ratio is not None:
        ax.set_box_aspect((ax.get_ylim()[1] - ax.get_ylim()[0]) / (ax.get_xlim()[1] - ax.get_xlim()[0]))
    ax.set(**dict(zip(("xlabel", "ylabel"), axis_names(result), strict=True)))
    ax.locator_params(nbins=5)
    return figure, ax


def shared_levels(*results: LandscapeResult, cap: float | None = None) -> Tensor:
    """Return ``levels=`` for :func:`plot_contour` that cover several planes, so that equal colours mean equal losses.

    Args:
        results: the landscapes, with two axes each.
        cap: losses above ``cap`` count as ``cap``.

    Returns:
        Losses in ascending order, float64.

    Raises:
        FlatnessError: a result does not have two axes, it has no finite loss, or ``cap`` is not above its lowest loss.

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> planes = [loss_landscape(net, [batch], steps=5, seed=seed) for seed in (0, 1)]
        >>> levels = shared_levels(*planes)
        >>> figures = [plot_contour(plane, levels=levels)[0] for plane in planes]
        >>> bool((levels.diff() > 0).all())
        True
    """
    return contour_levels(torch.cat([drawable_losses(one, 2, "shared_levels", cap).flatten() for one in results]))


def contour_levels(losses: Tensor) -> Tensor:
    """Return the default levels of the contours: losses in ascending order, in float64."""
    finite = losses[losses.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    if is_constant(losses):
        half = 0.5 * (abs(low) or 1.0)
        return torch.tensor([low - half, low + half], dtype=torch.float64, device="cpu")
    if is_logarithmic(low, high):
        levels = torch.logspace(math.log10(low), math.log10(high), NUM_LEVELS, dtype=torch.float64, device="cpu")
        levels[0], levels[-1] = low, high  # without rounding, so that all losses lie within the levels
        return levels
    return torch.linspace(low, high, NUM_LEVELS, dtype=torch.float64, device="cpu")


def _norm(levels: Tensor) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(levels[0]), float(levels[-1])
    return LogNorm(low, high) if is_logarithmic(low, high) else Normalize(low, high)


def _ratio(result: LandscapeResult) -> float | None:
    """Return the height of a plane divided by its width, or None if the plane is not drawn to scale."""
    width, height = (float(axis[-1] - axis[0]) for axis in result.coordinates)
    is_long = max(width, height) > MOST_ELONGATED * min(width, height)
    return None if result.update == "adam" or is_long else height / width


def _draw_filled(figure: Any, ax: Any, result: LandscapeResult, losses: Tensor, levels: Tensor, extend: str) -> None:
    """Draw filled contours, white lines at round losses, and a colour bar as high as the axes."""
    x, y = result.coordinates
    norm = _norm(levels)
    filled = ax.contourf(x, y, masked(losses.T), levels=levels.tolist(), cmap=COLOURS, norm=norm, extend=extend)
    low, high = float(levels[0]), float(levels[-1])
    form = None
    if len(levels) == 2 and is_constant(losses):
        ticks, form = [float(levels.mean())], "%.6g"
    else:
        ticks = round_losses(low, high, is_logarithmic(low, high))
        ax.contour(x, y, masked(losses.T), levels=ticks, colors="white", linewidths=0.6, alpha=0.8)
    draw_colour_bar(figure, {"cax": ax.inset_axes((1.04, 0.0, 0.045, 1.0))}, filled, ticks, form)


def _draw_lines(ax: Any, result: LandscapeResult, losses: Tensor, levels: Tensor, color: Any, label: str | None) -> Any:
    """Draw lines of equal loss in one colour, at round losses within ``levels``; return a handle for the legend."""
    low, high = float(levels[0]), float(levels[-1])
    stroke = STROKES[len(overlays(ax, "plane")) % len(STROKES)]
    at = round_losses(low, high, is_logarithmic(low, high))
    style = {"colors": [color], "linestyles": stroke, "linewidths": 1.2}
    lines = ax.contour(*result.coordinates, masked(losses.T), levels=at, **style)
    ax.clabel(lines, fontsize=7, fmt=short)
    (handle,) = ax.plot([], [], color=color, linestyle=stroke, label=label or "loss")
    return handle


def _set_limits(ax: Any, x: Tensor, y: Tensor, is_overlay: bool) -> None:
    """Set the limits of the axes so that the plane is visible; with ``is_overlay``, earlier planes stay visible."""
    for axis, name in ((x, "x"), (y, "y")):
        low, high = float(axis[0]), float(axis[-1])
        if is_overlay:
            before = getattr(ax, f"get_{name}lim")()
            low, high = min(low, before[0]), max(high, before[1])
        getattr(ax, f"set_{name}lim")(low, high)


def _draw_gaps(ax: Any, result: LandscapeResult, masks: dict[str, Tensor]) -> list[Any]:
    """Hatch the cells of the grid that have a corner without a finite loss; return handles for the legend.

    ``masks`` maps every reason why points have no finite loss to a mask of these points, from
    :func:`~lightning_flatness.plots.landscape.gaps`.
    """
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
    """Draw the trajectory as a line, and mark its first and last point; return handles for the legend."""
    points = torch.as_tensor(trajectory, device="cpu")
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not bool(points.isfinite().all()):
        raise FlatnessError(
            f"trajectory has shape {tuple(points.shape)}; give finite coordinates (points, 2) of one point or more."
        )
    from matplotlib.patheffects import withStroke

    # A black line with a white edge is visible on every colour.
    style = {"color": "black", "marker": "o", "markersize": 3.0, "linewidth": 1.2}
    ax.plot(points[:, 0], points[:, 1], path_effects=[withStroke(linewidth=3.0, foreground="white")], **style)
    handles = []
    for label, point, inner in (("start", points[0], "white"), ("end", points[-1], END_COLOUR)):
        style = {"marker": "o", "markersize": 9, "markerfacecolor": inner, "markeredgecolor": "black"}
        (marker,) = ax.plot(*point.tolist(), linestyle="none", markeredgewidth=0.8, label=label, **style)
        if all(axis[0] <= at <= axis[-1] for axis, at in zip(result.coordinates, point, strict=True)):
            handles.append(marker)
    return handles


def _same_points(one: LandscapeResult, other: LandscapeResult) -> bool:
    """Return whether two landscapes have the same axes and were computed at the same points."""
    apart = ("batch_norm", "fingerprint", "loss")  # what does not move the points, or depends on the batches, too
    settings = [name for name in SETTINGS if name not in apart]
    return (
        all(getattr(one, name) == getattr(other, name) for name in settings)
        and all(map(torch.equal, one.coordinates, other.coordinates))
        and all(math.isclose(*norms, rel_tol=1e-6) for norms in zip(one.axis_norms, other.axis_norms, strict=True))
    )


def plot_kept_and_recomputed(
    kept: LandscapeResult, recomputed: LandscapeResult, *, cap: float | None = None, data: str | None = None
) -> tuple[Any, Any]:
    """Draw two landscapes that differ in the running statistics of BatchNorm.

    Landscapes on a line are drawn into the same axes. Those on a plane are side by side, with one colour scale.

    Args:
        kept: a landscape with ``batch_norm="kept"``, which uses the model's statistics at all points.
        recomputed: a landscape at the same points with ``batch_norm="recomputed"``, which uses new statistics at every
            point.
        cap: draw losses above ``cap`` as if they were ``cap``.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.

    Returns:
        The figure and its axes. For planes, the axes are an array of two.

    Raises:
        FlatnessError: the landscapes are at different points, they are not ``"kept"`` and ``"recomputed"`` in this
            order, or one of them cannot be drawn (see :func:`plot_contour`).

    Example:
        >>> import torch
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = torch.nn.BatchNorm1d(2), (torch.randn(6, 2), torch.arange(6) % 2)
        >>> options = {"axes": ["random"], "normalize": "none", "steps": 5}
        >>> kept = loss_landscape(net, [batch], batch_norm="kept", **options)
        >>> recomputed = loss_landscape(net, [batch], batch_norm="recomputed", **options)
        >>> figure, ax = plot_kept_and_recomputed(kept, recomputed)
        >>> ax.get_ylabel()
        'loss'
    """
    pair = (kept, recomputed)
    if [result.batch_norm for result in pair] != ["kept", "recomputed"]:
        raise FlatnessError(
            "Give a landscape with batch_norm='kept' and one with 'recomputed', in this order. "
            f"The given landscapes have '{kept.batch_norm}' and '{recomputed.batch_norm}'."
        )
    if not _same_points(kept, recomputed):
        raise FlatnessError(
            "The two landscapes must have the same points: the same axes, normalisation, coordinates and seed."
        )
    if len(kept.axes) == 1:
        figure, ax = axes_or_new(None, 6.0, 3.8)
        for result in pair:
            plot_line(result, cap=cap, label=f"statistics {result.batch_norm}", data=data, ax=ax)
        return figure, ax
    levels = shared_levels(*pair, cap=cap)
    figure, axes = axes_or_new(None, 10.4, 1.5 + 3.7 * min(max(_ratio(kept) or 0.8, 0.4), 1.3), ncols=2)
    for ax, result in zip(axes, pair, strict=True):
        plot_contour(result, cap=cap, levels=levels, data=data, ax=ax)
    return figure, axes
