"""Accuracy and relative flatness over the epochs, on two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness.plots.canvas import axes_or_new, label_epochs, plain_frame, plot_over_epochs

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
    """Draw accuracy (left axis) and relative flatness (right axis, logarithmic if positive) over the epochs.

    If no record has a relative flatness, the Hessian trace is drawn instead.

    Args:
        history: records as in :attr:`FlatnessCallback.history`, with ``epoch``, ``relative_flatness`` (in units of
            the loss) and optionally ``accuracy``.
        accuracy_label: label of the left axis.
        data: the data that flatness was measured on, for the label of the right axis: ``"val"``, ``"train"`` or a name.
        burn_in: number of epochs to shade, those that a stopping rule ignores.
        ax: axes to draw into; by default those of a new figure.

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
    if any(value is not None for value in accuracies):
        plot_over_epochs(ax, epochs, accuracies, color=ACCURACY_COLOUR, markersize=3.5)
    plot_over_epochs(right, epochs, flatness, color=FLATNESS_COLOUR, markersize=3.5)
    if all(value is not None and value > 0 for value in flatness):
        right.set_yscale("log")
    label_epochs(ax, [] if burn_in else epochs)
    ax.set_ylabel(accuracy_label, color=ACCURACY_COLOUR)
    name = "relative flatness" if measure == "relative_flatness" else "Hessian trace"
    right.set_ylabel(f"{name} on {DATA.get(data, data)} data", color=FLATNESS_COLOUR)
    ax.tick_params(axis="y", colors=ACCURACY_COLOUR)
    right.tick_params(axis="y", which="both", colors=FLATNESS_COLOUR)
    right.spines[["top"]].set_visible(False)
    plain_frame(ax, "both", hidden=["top"])
    if burn_in:
        first = min(epochs, default=0)
        ax.axvspan(first, burn_in - 0.5, color="0.5", alpha=0.12, linewidth=0)
        middle = (first + burn_in - 0.5) / 2
        ax.annotate("burn-in", (middle, 1.01), xycoords=("data", "axes fraction"), ha="center", color="0.4", fontsize=9)
    return figure, ax
