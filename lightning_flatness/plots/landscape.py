"""Loss landscapes: lines, contours, surfaces."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.results import LandscapeResult

LOSS_COLOUR, ACCURACY_COLOUR, TRAJECTORY_COLOUR = "#1f4e9c", "#c8641e", "#e4572e"
# Points without a loss to draw, by the reason.
GAPS: dict[str, dict[str, Any]] = {
    "not finite": {"facecolor": "#d9d9d9", "hatch": "///", "edgecolor": "white"},
    "not computed": {"facecolor": "white", "hatch": "...", "edgecolor": "#c4c4c4"},
}
COLOURS = "viridis"
NUM_LEVELS = 24
NUM_FACETS = 20


def plot_line(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    accuracy: bool = True,
    label: str | None = None,
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw the loss along a line, with accuracy on an axis of its own.

    Points without a finite loss are bands hatched in grey, and those that were not computed, dotted bands.

    Args:
        result: with one axis.
        cap: losses above are drawn here.
        accuracy: draw it where there is one.
        label: of the curve, for a legend; to compare lines, draw them into one ``ax`` with ``accuracy=False``.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: matplotlib is missing, or the result is a plane.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_line(loss_landscape(nn.Linear(2, 3), [batch], axes=["random"], steps=5))
        >>> ax.get_ylabel()
        'loss'
    """
    losses = _capped(_of(result, 1, "plot_line"), cap)
    figure, ax = axes_or_new(ax, 5.2, 3.6)
    (x,) = result.coordinates
    colour = LOSS_COLOUR if label is None else None
    ax.plot(x, losses, color=colour, marker="o", markersize=2.5, linewidth=1.5, label=label)
    ax.set_xlabel(_labels(result)[0])
    ax.set_ylabel("loss")
    ax.axvline(0, color="black", linewidth=0.6, alpha=0.5)
    ax.margins(x=0)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    half = float(x[1] - x[0]) / 2
    for reason, points in _gaps(result, result.losses).items():
        for missing in x[points].tolist():
            low, high = max(missing - half, float(x[0])), min(missing + half, float(x[-1]))
            known = ax.get_legend_handles_labels()[1]
            ax.axvspan(low, high, linewidth=0, label=None if reason in known else reason, **GAPS[reason])
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
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw the loss on a plane as filled contours, and the model as a cross.

    What has no finite loss is hatched in grey, and what was not computed, dotted.
    Levels are spaced evenly in the logarithm of the loss where that spans more than a factor of ten.

    Args:
        result: with two axes.
        cap: losses above are drawn as this.
        trajectory: ``(points, 2)``, coordinates to be joined, from
            :func:`~lightning_flatness.pca_directions`, in the order of time; the part outside of the plane is not seen.
        levels: of the contours, ascending.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: matplotlib is missing, the result is a line, or has no finite loss.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_contour(loss_landscape(nn.Linear(2, 3), [batch], steps=5))
        >>> ax.get_xlabel()
        'random direction 1'
    """
    losses = _capped(_of(result, 2, "plot_contour"), cap)
    figure, ax = axes_or_new(ax, 5.0, 4.0)
    x, y = result.coordinates
    levels = _levels(losses) if levels is None else levels
    gaps = _gaps(result, losses)
    handles = _draw_gaps(ax, result, gaps)
    if bool((_corners(losses.isfinite()) >= 3).any()):
        masked = _masked(losses.T)
        beyond = cap is not None and bool((result.losses > cap).any())
        colours = {"cmap": COLOURS, "norm": _norm(levels), "extend": "max" if beyond else "neither"}
        filled = ax.contourf(x, y, masked, levels=levels.tolist(), **colours)
        ax.contour(x, y, masked, levels=levels[::3].tolist(), colors="white", linewidths=0.5, alpha=0.7)
        _draw_bar(figure, ax, filled, levels, losses)
    else:
        seen = losses[losses.isfinite()]
        text = f"too few points for contours: {len(seen)} of {losses.numel()},\nwith a loss of {float(seen.min()):.6g}"
        ax.text(0.5, 0.75, text, transform=ax.transAxes, ha="center", fontsize=8, bbox={"color": "white"})
    if trajectory is not None:
        handles += _draw_trajectory(ax, result, _trajectory(trajectory))
    model = {"marker": "x", "color": "black", "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none"}
    handles += ax.plot(0, _model_at(result), label="model", **model)
    if len(handles) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5, "frameon": False}
        ax.legend(handles=handles, ncols=len(handles), fontsize=7, handleheight=1.4, **below)
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.set_ylim(float(y[0]), float(y[-1]))
    labels = _labels(result)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    return figure, ax


def plot_surface(
    result: LandscapeResult, *, cap: float | None = None, log: bool = False, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw the loss on a plane as a surface with its contours below.

    What has no finite loss, or was not computed, is a hole.

    Args:
        result: with two axes.
        cap: losses above are drawn as this; a surface that rises steeply is readable only with one, or with ``log``.
        log: draw the decimal logarithm of the loss.
        ax: draw here, axes with ``projection="3d"``, instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: matplotlib is missing, the result is a line, has no finite loss, or with ``log`` a negative one.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(6, 2), torch.arange(6) % 3
        >>> figure, ax = plot_surface(loss_landscape(nn.Linear(2, 3), [batch], steps=5))
        >>> ax.get_zlabel()
        'loss'
    """
    losses = _capped(_of(result, 2, "plot_surface"), cap)
    finite = losses[losses.isfinite()]
    if log and not bool((finite > 0).all()):
        raise FlatnessError("log=True draws the logarithm of the loss, and there are losses that are not positive.")
    heights = losses.log10() if log else losses
    figure, ax = axes_or_new(ax, 5.4, 4.4, subplot_kw={"projection": "3d"})
    seen = heights[heights.isfinite()]
    low, high = float(seen.min()), float(seen.max())
    height = high - low or 1.0
    # A facet has one colour, so with few points there are several between them.
    parts = [max(1, NUM_FACETS // (len(axis) - 1)) for axis in result.coordinates]
    x, y = torch.meshgrid(*map(_refined, result.coordinates, parts), indexing="ij")
    drawn = _refined(_refined(torch.where(heights.isfinite(), heights, math.nan), parts[0]).T, parts[1]).T
    ax.plot_surface(
        x.numpy(), y.numpy(), drawn.numpy(), cmap=COLOURS, vmin=low, vmax=high, rcount=200, ccount=200, linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    floor = low - 0.35 * height
    flat = _constant(heights)
    if not flat and bool((_corners(heights.isfinite()) >= 3).any()):
        x, y = torch.meshgrid(*result.coordinates, indexing="ij")
        below = {"zdir": "z", "offset": floor, "cmap": COLOURS, "linewidths": 0.8}
        ax.contour(x.numpy(), y.numpy(), _masked(heights), levels=12, **below)
    ax.set_zlim(floor, high)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    ax.yaxis.get_major_locator().set_params(nbins=5)
    ax.set_zticks([low] if flat else [tick for tick in ax.get_zticks() if low - 0.05 * height <= tick <= high])
    named = zip((ax.xaxis, ax.yaxis, ax.zaxis), [*_labels(result), "log₁₀ loss" if log else "loss"], strict=True)
    for axis, label in named:
        _label(axis, label)
    holes = [f"{int(points.sum())} {reason}" for reason, points in _gaps(result, losses).items()]
    if holes:
        ax.text2D(
            0.02, 0.95, f"holes: {', '.join(holes)}, of {losses.numel()} points", transform=ax.transAxes, fontsize=8
        )
    ax.view_init(elev=28, azim=-55)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_facecolor((1, 1, 1, 0))
        axis.set_tick_params(labelsize=8)
    ax.set_box_aspect((1, 1, 0.75), zoom=0.88)
    return figure, ax


def plot_kept_and_recomputed(
    kept: LandscapeResult, recomputed: LandscapeResult, *, cap: float | None = None
) -> tuple[Any, Any]:
    """Draw two landscapes side by side: the model's BatchNorm statistics, and those of every point; in equal colours.

    Args:
        kept: with ``batch_norm="kept"``.
        recomputed: with ``batch_norm="recomputed"``, at the same points.
        cap: losses above are drawn as this.

    Returns:
        The figure and the two axes; for lines, one of which holds both.

    Raises:
        FlatnessError: matplotlib is missing, or these are not two such landscapes.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import loss_landscape
        >>> net, batch = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> pair = [loss_landscape(net, [batch], steps=5, batch_norm=name) for name in ("kept", "recomputed")]
        >>> figure, (left, right) = plot_kept_and_recomputed(*pair)
        >>> right.get_title()
        'BatchNorm statistics recomputed'
    """
    pair = (kept, recomputed)
    same = len(kept.axes) == len(recomputed.axes) and all(
        torch.equal(*axes) for axes in zip(kept.coordinates, recomputed.coordinates, strict=True)
    )
    if [result.batch_norm for result in pair] != ["kept", "recomputed"] or not same:
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
    levels = _levels(torch.cat([_capped(_of(result, 2, "the figure"), cap).flatten() for result in pair]))
    figure, axes = axes_or_new(None, 9.2, 3.9, ncols=2)
    for ax, result in zip(axes, pair, strict=True):
        plot_contour(result, cap=cap, levels=levels, ax=ax)
        ax.set_title(f"BatchNorm statistics {result.batch_norm}", fontsize=10)
    return figure, axes


def _of(result: LandscapeResult, num_axes: int, figure: str) -> Tensor:
    if not isinstance(result, LandscapeResult) or len(result.axes) != num_axes:
        found = f"{len(result.axes)} axes" if isinstance(result, LandscapeResult) else type(result).__name__
        raise FlatnessError(
            f"{figure} draws a LandscapeResult with {num_axes} coordinate axes, and this is one with {found}."
        )
    if not bool(result.finite.any()):
        raise FlatnessError("The landscape has no finite loss, so there is nothing to draw.")
    return result.losses


def _capped(losses: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return losses
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > float(losses[losses.isfinite()].min()):
        raise FlatnessError(f"{cap=} must be a number above the lowest loss.")
    return torch.where(losses > cap, torch.full_like(losses, cap), losses)


def _gaps(result: LandscapeResult, losses: Tensor) -> dict[str, Tensor]:
    """Where there is nothing to draw, by the reason."""
    found = {"not finite": result.computed & ~losses.isfinite(), "not computed": ~result.computed}
    return {reason: points for reason, points in found.items() if bool(points.any())}


def _corners(points: Tensor) -> Tensor:
    """Of every cell between points of a plane, how many of its corners are among these."""
    sums = points[1:].int() + points[:-1].int()
    return sums[:, 1:] + sums[:, :-1]


def _draw_gaps(ax: Any, result: LandscapeResult, gaps: dict[str, Tensor]) -> list[Any]:
    """Cells with a corner among the gaps, below the contours; gives handles for a legend."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    drawn = torch.zeros_like(_corners(result.computed), dtype=torch.bool)
    for reason, points in gaps.items():
        style = GAPS[reason]
        cells = (_corners(points) > 0) & ~drawn
        drawn |= cells
        colour, hatch = ListedColormap([style["facecolor"]]), {"hatch": style["hatch"], "edgecolor": style["edgecolor"]}
        ax.pcolor(
            *(axis.numpy() for axis in result.coordinates),
            np.ma.masked_equal(cells.T.numpy(), 0),
            cmap=colour,
            linewidth=0,
            **hatch,
        )
    return [Patch(label=reason, linewidth=0, **GAPS[reason]) for reason in gaps]


def _draw_trajectory(ax: Any, result: LandscapeResult, points: Tensor) -> list[Any]:
    """A line with its first and last point marked; gives handles for a legend."""
    ax.plot(points[:, 0], points[:, 1], color=TRAJECTORY_COLOUR, marker="o", markersize=2.5, linewidth=1.2)
    handles = []
    for label, point, inner in (("start", points[0], "white"), ("end", points[-1], TRAJECTORY_COLOUR)):
        style = {"marker": "o", "markersize": 9, "markerfacecolor": inner, "markeredgecolor": "black"}
        (marker,) = ax.plot(*point.tolist(), linestyle="none", markeredgewidth=0.8, label=label, **style)
        if all(axis[0] <= at <= axis[-1] for axis, at in zip(result.coordinates, point, strict=True)):
            handles.append(marker)
    return handles


def _draw_bar(figure: Any, ax: Any, filled: Any, levels: Tensor, losses: Tensor) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    form = None
    if len(levels) == 2 and _constant(losses):
        ticks, form = [float(levels.mean())], "%.6g"
    elif isinstance(filled.norm, LogNorm):
        ticks = [float(level) for level in levels[:: max(1, (len(levels) - 1) // 6)]]
        # As many digits as tell them apart.
        form = next(
            f"%.{n}g" for n in range(3, 18) if n == 17 or len({f"{tick:.{n}g}" for tick in ticks}) == len(ticks)
        )
    else:
        low, high = float(levels[0]), float(levels[-1])
        places = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ticks = [float(tick) for tick in places if low <= tick <= high]  # others would be put at the ends
    bar = figure.colorbar(filled, ax=ax, ticks=ticks, format=form)
    bar.minorticks_off()
    _label(bar.ax.yaxis, "loss")


def _label(axis: Any, text: str) -> None:
    """Name an axis; a factor or an offset of its numbers goes into the name, where it runs into nothing."""
    formatter = axis.get_major_formatter()
    formatter.format_ticks(axis.get_majorticklocs())
    offset = formatter.get_offset()  # as "1e-9+9.89e-1"
    if offset:
        text += f"\n({'× ' if offset[0].isdigit() else ''}{offset.replace('+', ' + ').strip()})"
        axis.labelpad += 8
    axis.set_label_text(text)
    axis.get_offset_text().set_visible(False)


def _refined(values: Tensor, parts: int) -> Tensor:
    """With more points, on straight lines between those along the first dimension; gaps become no larger.

    Example:
        >>> _refined(torch.tensor([math.nan, 1.0, 3.0]), 2)
        tensor([nan, nan, 1., 2., 3.])
    """
    where = torch.arange(parts, dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1)) / parts
    start = values[:-1, None]
    between = torch.where(where > 0, start + (values[1:, None] - start) * where, start)
    return torch.cat([between.flatten(0, 1), values[-1:]])


def _constant(losses: Tensor) -> bool:
    """But for rounding."""
    finite = losses[losses.isfinite()]
    return float(finite.max() - finite.min()) <= 1e-12 * float(finite.abs().max())


def _levels(losses: Tensor) -> Tensor:
    finite = losses[losses.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    if _constant(losses):
        half = 0.5 * (abs(low) or 1.0)
        return torch.tensor([low - half, low + half], dtype=torch.float64)
    if low > 0 and high > 10 * low:
        levels = torch.logspace(math.log10(low), math.log10(high), NUM_LEVELS, dtype=torch.float64)
        levels[0], levels[-1] = low, high  # to the last digit, so that no point falls out
        return levels
    return torch.linspace(low, high, NUM_LEVELS, dtype=torch.float64)


def _norm(levels: Tensor) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(levels[0]), float(levels[-1])
    return LogNorm(low, high) if low > 0 and high > 10 * low else Normalize(low, high)


def _masked(losses: Tensor) -> Any:
    import numpy as np

    return np.ma.masked_invalid(losses.numpy())


def _trajectory(trajectory: Any) -> Tensor:
    points = torch.as_tensor(trajectory)
    if points.ndim != 2 or points.shape[1] != 2 or not bool(points.isfinite().all()):
        raise FlatnessError(f"trajectory has shape {tuple(points.shape)}; give finite coordinates (points, 2).")
    return points


def _labels(result: LandscapeResult) -> list[str]:
    if result.update == "adam":
        return ["α: steps of Adam, as learning rate", "β: factor of the second moment"]
    return list(result.axes)


def _model_at(result: LandscapeResult) -> float:
    return 1.0 if result.update == "adam" else 0.0
