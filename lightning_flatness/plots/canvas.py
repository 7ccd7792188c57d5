"""Helpers for all figures: axes, frames, curves over epochs; matplotlib is imported when needed, pyplot never."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError

# Curves with more points than this are drawn without markers.
MOST_MARKERS = 40


def axes_or_new(ax: Any, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its axes: those of ``ax``, or if it is None new ones, of the given size in inches."""
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FlatnessError("Figures need matplotlib: pip install 'lightning-flatness[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**options)


def plain_frame(ax: Any, grid: str, hidden: Sequence[str] = ("top", "right")) -> None:
    """Hide some sides of the frame, and draw a light grid across ``"x"``, ``"y"`` or ``"both"``."""
    ax.spines[list(hidden)].set_visible(False)
    ax.grid(axis=grid, alpha=0.25, linewidth=0.6)


def plot_over_epochs(ax: Any, epochs: Sequence[float], values: Sequence[float | None], **style: Any) -> None:
    """Draw a curve over epochs, with gaps at values that are None, and with markers if it has few points."""
    numbers = [math.nan if value is None else value for value in values]
    ax.plot(epochs, numbers, marker="o" if len(epochs) <= MOST_MARKERS else None, **style)


def label_epochs(ax: Any, epochs: Sequence[float]) -> None:
    """Label the epoch axis at whole epochs; around a single epoch, show half an epoch on either side."""
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if len(set(epochs)) == 1:
        ax.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
