"""A figure of one's own, without touching pyplot's global state; matplotlib is imported late."""

from __future__ import annotations

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
