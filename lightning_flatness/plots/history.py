"""Accuracy and relative flatness over the epochs, on two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness.plots.canvas import axes_or_new, label_epochs

ACCURACY_COLOUR = "#1f5fa8"
FLATNESS_COLOUR = "#c2511b"
DATA = {"val": "validation", "train": "training"}


def plot_history(
    history: Sequence[Mapping[str, float | None]],
    *,
    accuracy_label: str = "accuracy",
    data: str = "val",
    burn_in: int | None = None,
    ax: Any | None = None,
) -> tuple[Any, Any]:
    """Draw accuracy (left axis) and relative flatness (right axis, logarithmic) over the epochs.

    Where relative flatness was not measured, the Hessian trace.

    Args:
        history: as :attr:`FlatnessCallback.history` keeps it, records of ``epoch``, ``relative_flatness`` and, where
            known, ``accuracy``.
        accuracy_label: name of the accuracy, for the axis.
        data: what flatness was measured on, ``"val"``, ``"train"`` or else, for the axis.
        burn_in: epochs to shade, in which flatness does not yet tell anything.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the left axes.

    Raises:
        FlatnessError: matplotlib is missing.

    Example:
        >>> figure, ax = plot_history([{"epoch": 0, "accuracy": 0.5, "relative_flatness": 3.0}])
        >>> ax.get_ylabel()
        'accuracy'
    """
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    epochs = [record["epoch"] or 0 for record in history]
    accuracies = [record.get("accuracy") for record in history]
    measure = "relative_flatness" if any("relative_flatness" in record for record in history) else "hessian_trace"
    flatness = [record.get(measure) for record in history]
    right = ax.twinx()
    marker = "o" if len(epochs) <= 40 else None
    if any(value is not None for value in accuracies):
        values = [float("nan") if value is None else value for value in accuracies]
        ax.plot(epochs, values, color=ACCURACY_COLOUR, marker=marker, markersize=3.5)
    right.plot(
        epochs,
        [float("nan") if value is None else value for value in flatness],
        color=FLATNESS_COLOUR,
        marker=marker,
        markersize=3.5,
    )
    if all(value is not None and value > 0 for value in flatness):
        right.set_yscale("log")
    label_epochs(ax, [] if burn_in else epochs)
    ax.set_ylabel(accuracy_label, color=ACCURACY_COLOUR)
    name = "relative flatness" if measure == "relative_flatness" else "Hessian trace"
    right.set_ylabel(f"{name} on {DATA.get(data, data)} data", color=FLATNESS_COLOUR)
    ax.tick_params(axis="y", colors=ACCURACY_COLOUR)
    right.tick_params(axis="y", which="both", colors=FLATNESS_COLOUR)
    for axes in (ax, right):
        axes.spines[["top"]].set_visible(False)
    ax.grid(axis="both", alpha=0.25, linewidth=0.6)
    if burn_in:
        ax.axvspan(min(epochs, default=0), burn_in - 0.5, color="0.5", alpha=0.12, linewidth=0)
        middle = (min(epochs, default=0) + burn_in - 0.5) / 2
        ax.annotate("burn-in", (middle, 1.01), xycoords=("data", "axes fraction"), ha="center", color="0.4", fontsize=9)
    return figure, ax
