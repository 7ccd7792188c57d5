"""Loss landscapes: lines, contours, surfaces."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.results import LandscapeResult

LOSS_COLOUR, ACCURACY_COLOUR, MISSING_COLOUR = "#1f4e9c", "#c8641e", "#d9d9d9"
COLOURS = "viridis"
NUM_LEVELS = 24


def plot_line(
    result: LandscapeResult,
    *,
    cap: float | None = None,
    accuracy: bool = True,
    label: str | None = None,
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw the loss along a line, with accuracy on an axis of its own; points without a finite loss are grey bands.

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
    half = float(x[1] - x[0]) / 2
    for missing in x[~result.finite].tolist():
        low, high = max(missing - half, float(x[0])), min(missing + half, float(x[-1]))
        ax.axvspan(low, high, facecolor=MISSING_COLOUR, hatch="///", edgecolor="white", linewidth=0)
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
    """Draw the loss on a plane as filled contours, the model as a cross, what has no finite loss hatched in grey.

    Levels are spaced evenly in the logarithm of the loss where that spans more than a factor of ten.

    Args:
        result: with two axes.
        cap: losses above are drawn as this.
        trajectory: ``(points, 2)``, coordinates to be joined, from
            :func:`~lightning_flatness.pca_directions`; the part outside of the plane is not seen.
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
    masked = _masked(losses.T)
    if not bool(result.finite.all()):
        ax.set_facecolor(MISSING_COLOUR)
        ax.patch.set(hatch="///", edgecolor="white")
    norm = _norm(levels)
    filled = ax.contourf(
        x, y, masked, levels=levels.tolist(), cmap=COLOURS, norm=norm, extend="neither" if cap is None else "max"
    )
    ax.contour(x, y, masked, levels=levels[::3].tolist(), colors="white", linewidths=0.5, alpha=0.7)
    bar = figure.colorbar(filled, ax=ax, label="loss", ticks=_ticks(levels), format="%.3g")
    bar.minorticks_off()
    if trajectory is not None:
        points = _trajectory(trajectory)
        ax.plot(points[:, 0], points[:, 1], color="#e4572e", marker="o", markersize=2.5, linewidth=1.2)
    ax.plot(0, _model_at(result), marker="x", color="black", markersize=7, markeredgewidth=1.6, linestyle="none")
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.set_ylim(float(y[0]), float(y[-1]))
    labels = _labels(result)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    return figure, ax


def plot_surface(
    result: LandscapeResult, *, cap: float | None = None, log: bool = False, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw the loss on a plane as a surface with its contours below; what has no finite loss is a hole.

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
    x, y = torch.meshgrid(*result.coordinates, indexing="ij")
    seen = heights[heights.isfinite()]
    low, high = float(seen.min()), float(seen.max())
    drawn = torch.where(heights.isfinite(), heights, math.nan).numpy()
    height = high - low or 1.0
    ax.plot_surface(
        x.numpy(), y.numpy(), drawn, cmap=COLOURS, vmin=low, vmax=high, rcount=200, ccount=200, linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    floor = low - 0.35 * height
    ax.contour(x.numpy(), y.numpy(), _masked(heights), levels=12, zdir="z", offset=floor, cmap=COLOURS, linewidths=0.8)
    ax.set_zlim(floor, high)
    ax.xaxis.get_major_locator().set_params(nbins=5)
    ax.yaxis.get_major_locator().set_params(nbins=5)
    ax.set_zticks([tick for tick in ax.get_zticks() if low - 0.05 * height <= tick <= high])
    labels = _labels(result)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.set_zlabel("log₁₀ loss" if log else "loss")
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


def _levels(losses: Tensor) -> Tensor:
    finite = losses[losses.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    if low > 0 and high > 10 * low:
        levels = torch.logspace(math.log10(low), math.log10(high), NUM_LEVELS, dtype=torch.float64)
        levels[0], levels[-1] = low, high  # to the last digit, so that no point falls out
        return levels
    return torch.linspace(low, high, NUM_LEVELS, dtype=torch.float64)


def _norm(levels: Tensor) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(levels[0]), float(levels[-1])
    return LogNorm(low, high) if low > 0 and high > 10 * low else Normalize(low, high)


def _ticks(levels: Tensor) -> list[float]:
    return [float(level) for level in levels[:: max(1, (len(levels) - 1) // 6)]]


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
