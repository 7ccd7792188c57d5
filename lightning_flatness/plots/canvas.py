"""A figure of one's own, without touching pyplot's global state; matplotlib is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError


def axes_or_new(ax: Any | None, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """``(figure, axes)``: those of ``ax``, or new ones of this size in inches, with ``options`` of ``subplots``.

    Raises:
        FlatnessError: matplotlib is missing.
    """
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FlatnessError("Figures need matplotlib: pip install 'lightning-flatness[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**options)


def label_epochs(ax: Any, epochs: Sequence[float]) -> None:
    """An axis of epochs: whole numbers, and half an epoch on either side of a single one."""
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if len(set(epochs)) == 1:
        ax.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
