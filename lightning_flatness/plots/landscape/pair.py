"""Two landscapes side by side: with the model's BatchNorm statistics, and with recomputed ones."""

from __future__ import annotations

from typing import Any

import torch

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.plots.landscape.common import drawable_losses
from lightning_flatness.plots.landscape.contour import contour_levels, plot_contour
from lightning_flatness.plots.landscape.line import plot_line
from lightning_flatness.results import LandscapeResult


def plot_kept_and_recomputed(
    kept: LandscapeResult, recomputed: LandscapeResult, *, cap: float | None = None
) -> tuple[Any, Any]:
    """Compare two landscapes: with the BatchNorm statistics of the model, and with those of every point.

    Lines are drawn into the same axes; planes side by side, with equal colours.

    Args:
        kept: a landscape with ``batch_norm="kept"``.
        recomputed: a landscape of the same points with ``batch_norm="recomputed"``.
        cap: draw losses above this value as this value, in units of the loss.

    Returns:
        The figure, and its axes for lines or an array of two axes for planes.

    Raises:
        FlatnessError: matplotlib is missing, the landscapes are not such a pair or have no finite loss, or ``cap`` is
            too low.

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
