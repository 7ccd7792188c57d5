"""Draw flatness over the epochs, as one curve for the sum over all measured layers, or as one curve for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import (
    LEGEND_SIZE,
    SERIES,
    axes_or_new,
    label_epochs,
    label_logarithm,
    panel_below,
    plain_frame,
    plot_over_epochs,
    set_heading,
)
from lightning_flatness.plots.words import (
    NAMES,
    check_measure,
    exactness,
    finite,
    is_exact,
    known_error,
    label_of,
    recorded_exactness,
    subject_of,
)
from lightning_flatness.results import FlatnessReport, number_of
from lightning_flatness.results.texts import samples_of

ACCURACY_COLOUR, FLATNESS_COLOUR = SERIES[:2]
# Error bands are drawn only up to this number of layers, because more bands would hide each other.
MOST_BANDS = 6
# With more layers than this, the figure has a colour bar instead of a legend.
MOST_NAMES = 12
BAND = "± 2 standard errors over samples"
Record = Mapping[str, Any]


def plot_history(
    history: Sequence[Record],
    *,
    measure: str | None = None,
    report: FlatnessReport | None = None,
    accuracy_label: str = "accuracy",
    data: str | None = None,
    burn_in: int | None = None,
    best: int | None = None,
    stopped: int | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the accuracy over the epochs and, in a second panel below, one measure of flatness.

    If the history has no accuracy, there is only the panel of flatness. The axis of flatness is logarithmic if all
    values are positive. Where values are not exact, markers are hollow and the curve is dashed. If the history has
    standard errors over samples, a band of two standard errors is drawn around the values.

    Args:
        history: records with ``epoch``, the measure, and optionally ``accuracy``, ``exact`` and ``{measure}_error``,
            such as :attr:`FlatnessCallback.history`.
        measure: the measure to draw, such as ``"normalized_relative_flatness"``. By default relative flatness, or the
            Hessian trace if no record has relative flatness.
        report: a report of the run, such as :attr:`FlatnessCallback.report`. The title then names the layers, samples
            and method of the report.
        accuracy_label: label of the accuracy axis.
        data: the data that flatness was measured on: ``"val"``, ``"train"`` or another name. By default the data that
            the report or the history names.
        burn_in: number of initial epochs that a stopping rule ignores; these epochs are shaded.
        best: epoch to mark as the best; by default the first epoch with the highest accuracy. Of several records of
            this epoch, the one with the highest accuracy is marked.
        stopped: epoch after which training was stopped early; a vertical line marks it.
        ax: axes to draw into; the place of ``ax`` is divided between the two panels.

    Returns:
        The figure and the upper axes; ``figure.axes`` holds both.

    Raises:
        FlatnessError: ``measure`` is unknown, or matplotlib is missing.

    Example:
        >>> history = [{"epoch": epoch, "accuracy": 0.5, "relative_flatness": 3.0} for epoch in range(3)]
        >>> figure, ax = plot_history(history)
        >>> len(figure.axes)
        2
    """
    check_type("history", history, Sequence, "the history of a FlatnessCallback")
    if measure is None:
        measures = ("relative_flatness", "hessian_trace")
        measure = next((name for name in measures if any(name in record for record in history)), "relative_flatness")
    check_measure(measure, NAMES)
    figure, upper = axes_or_new(ax, 7.0, 4.6)
    epochs = [record["epoch"] or 0 for record in history]
    accuracies = [record.get("accuracy") for record in history]
    panels = [upper]
    if any(value is not None for value in accuracies):
        panels.append(panel_below(figure, upper, (2, 3)))
        plot_over_epochs(upper, epochs, accuracies, color=ACCURACY_COLOUR, markersize=3.5)
        upper.set_ylabel(accuracy_label)
    values, lower = [record.get(measure) for record in history], panels[-1]
    flags = [is_exact(record.get("exact")) for record in history]
    plot_over_epochs(lower, epochs, values, flags, color=FLATNESS_COLOUR, markersize=3.5, label=_label(flags))
    errors = [record.get(f"{measure}_error") for record in history]
    has_band = _draw_band(lower, epochs, values, errors, FLATNESS_COLOUR, BAND)
    lower.set_ylabel(label_of(measure).replace("  (", "\n("))
    _scale(lower, values, errors)
    _mark(panels, epochs, burn_in, stopped)
    if (index := _best(epochs, accuracies, best)) is not None:
        words = (
            f"highest accuracy {accuracies[index]:.4g}, epoch {epochs[index]}" if best is None else f"best epoch {best}"
        )
        shown = [accuracies[index], values[index]]
        _mark_best(panels, epochs[index], shown[-len(panels) :], words)
    for panel in panels:
        plain_frame(panel, "both")
        if panel.get_legend_handles_labels()[1] and (panel is upper or has_band or not all(flags)):
            panel.legend(fontsize=LEGEND_SIZE, frameon=False)
    label_epochs(lower, [] if burn_in else epochs)
    names = list(report.layers) if report else history[-1].get("layers") if history else None
    subject = subject_of(names) if names else ""
    set_heading(upper, *_heading(measure, subject, history, report, data))
    return figure, upper


def _label(flags: Sequence[bool]) -> str:
    return "exact" if all(flags) else "exact (hollow, dashed: not exact)" if any(flags) else "not exact"


def _best(epochs: Sequence[int], accuracies: Sequence[float | None], best: int | None) -> int | None:
    """Return the index of the first record with the highest accuracy, or None if no accuracy is known.

    If ``best`` is given, return the index of the best record of this epoch, or None if there is no such record.
    """
    known = [-math.inf if value is None or math.isnan(value) else value for value in accuracies]
    wanted = [index for index, epoch in enumerate(epochs) if best in (None, epoch)]
    index = max(wanted, key=known.__getitem__, default=None)
    return None if index is None or (best is None and math.isinf(known[index])) else index


def _draw_band(
    ax: Any,
    epochs: Sequence[int],
    values: Sequence[float | None],
    errors: Sequence[float | None],
    colour: Any,
    label: str | None,
) -> bool:
    """Draw a band of two standard errors around the values; return False if no standard error is known."""
    widths = [2 * known_error(error) if value is not None else 0.0 for value, error in zip(values, errors, strict=True)]
    if not any(widths):
        return False
    middle = [math.nan if value is None else value for value in values]
    low, high = ([value + sign * width for value, width in zip(middle, widths, strict=True)] for sign in (-1, 1))
    ax.fill_between(epochs, low, high, color=colour, alpha=0.22, linewidth=0, label=label)
    return True


def _scale(ax: Any, values: Sequence[float | None], errors: Sequence[float | None]) -> None:
    """Make the axis logarithmic if all values are positive; bands may extend below the lower limit of the axis."""
    known = finite(values)
    if not known or min(known) <= 0:
        return
    ax.set_yscale("log")
    widths = [2 * known_error(error) for value, error in zip(values, errors, strict=True) if finite([value])]
    pairs = list(zip(known, widths, strict=True))
    low = min([*known, *(value - width for value, width in pairs if value - width > 0.2 * min(known))])
    highest = max(value + width for value, width in pairs)
    margin = max((highest / low) ** 0.06, 1.03)
    ax.set_ylim(low / margin, highest * margin)
    label_logarithm(ax.yaxis)


def _mark(panels: Sequence[Any], epochs: Sequence[int], burn_in: int | None, stopped: int | None) -> None:
    """Mark the burn-in and the early stop in all panels; the upper panel's legend explains the marks."""
    for panel in panels:
        is_named = panel is panels[0]
        if burn_in:
            label = f"burn-in: {number_of(burn_in, 'epoch')}" if is_named else None
            panel.axvspan(min(epochs, default=0), burn_in - 0.5, color="0.5", alpha=0.14, linewidth=0, label=label)
        if stopped is not None:
            label = f"stopped after epoch {stopped}" if is_named else None
            panel.axvline(stopped, color="0.3", linewidth=1.0, linestyle="-.", label=label)


def _mark_best(panels: Sequence[Any], epoch: int, values: Sequence[float | None], label: str) -> None:
    """Mark the best epoch in all panels by a line. If a panel's value in this epoch is known, draw a ring around it.

    The upper panel's legend has the ``label``.
    """
    for panel, value in zip(panels, values, strict=True):
        known = finite([value])
        own = label if panel is panels[0] else None
        panel.axvline(epoch, color="0.3", linewidth=0.8, linestyle=":", label=None if known else own)
        if known:
            ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
            panel.plot([epoch], known, linestyle="none", **ring, label=own)


def _heading(
    measure: str, subject: str, history: Sequence[Record], report: FlatnessReport | None, data: str | None
) -> tuple[str, str]:
    """Return two lines for the title: one on the measure and layers, one on samples and whether numbers are exact."""
    name = NAMES[measure][0].upper() + NAMES[measure][1:]
    if report is not None:
        where = samples_of(report.num_samples, data or report.data)
        exact = exactness([layer.info for layer in report.layers.values()])
    else:
        last: Record = history[-1] if history else {}
        where = samples_of(last.get("num_samples") or 0, data or last.get("data"))
        exact = recorded_exactness(history)
    return f"{name} of {subject}" if subject else name, "; ".join(filter(None, (where, exact)))


def plot_layer_history(
    history: Sequence[Record],
    measure: str = "relative_flatness",
    *,
    report: FlatnessReport | None = None,
    data: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw one measure of every layer over the epochs, as curves from dark (first layer) to light (last layer).

    The axis is logarithmic if all values are positive. Where values are not exact, markers are hollow and curves are
    dashed. With up to six layers, bands show two standard errors over samples if the history has them.

    Args:
        history: records with ``epoch`` and ``{layer}/{measure}``, such as :attr:`FlatnessCallback.history`. The
            callback records values of single layers if it measures two or more layers.
        measure: ``"hessian_trace"`` (loss per squared weight), or a measure in units of the loss, such as
            ``"relative_flatness"``.
        report: a report of the run. The title then names the samples and the method of the report.
        data: the data that flatness was measured on: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: ``measure`` is unknown, the history has no values of single layers, or matplotlib is missing.

    Example:
        >>> history = [{"epoch": epoch, "conv1/hessian_trace": 2.0, "conv2/hessian_trace": 1.0} for epoch in range(3)]
        >>> figure, ax = plot_layer_history(history, "hessian_trace")
        >>> ax.get_ylabel()
        'Hessian trace  (loss per squared weight)'
    """
    check_type("history", history, Sequence, "the history of a FlatnessCallback")
    check_measure(measure, NAMES)
    suffix = f"/{measure}"
    keys = list(dict.fromkeys(key for record in history for key in record if key.endswith(suffix)))
    if not keys:
        raise FlatnessError(
            f"The history has no {measure} of single layers. A callback records such values if it measures two or more "
            "layers. For one layer, use plot_history."
        )
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    from matplotlib import colormaps  # axes_or_new comes first: its error says how to install matplotlib

    epochs = [record["epoch"] or 0 for record in history]
    colours = colormaps["viridis"]
    drawn: list[float] = []
    largest = 0.0
    for index, key in enumerate(keys):
        values = [record.get(key) for record in history]
        errors = [record.get(f"{key}_error") for record in history]
        name = key.removesuffix(suffix)
        flags = [is_exact(record.get(f"{name}/exact", record.get("exact"))) for record in history]
        style = {"color": colours(0.9 * index / max(1, len(keys) - 1)), "markersize": 3.5, "linewidth": 1.2}
        plot_over_epochs(ax, epochs, values, flags, marker="os^Dv"[index % 5], label=name, **style)
        if len(keys) <= MOST_BANDS:
            _draw_band(ax, epochs, values, errors, style["color"], None)
        drawn += finite(values)
        shares = [known_error(e) / abs(v) for v, e in zip(values, errors, strict=True) if v and math.isfinite(v)]
        largest = max([largest, *shares])
    if drawn and min(drawn) > 0:
        ax.set_yscale("log")
        ax.set_ylim(min(drawn) / 1.2, max(drawn) * 1.2)
        label_logarithm(ax.yaxis)
    if len(keys) <= MOST_NAMES:
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _draw_order(figure, ax, [key.removesuffix(suffix) for key in keys])
    label_epochs(ax, epochs)
    ax.set_ylabel(label_of(measure))
    plain_frame(ax, "both")
    sure = f"2 standard errors over samples: at most {200 * largest:.2g} %" if largest else ""
    bands = " (bands)" if largest and len(keys) <= MOST_BANDS else ""
    subject = number_of(len(keys), "layer")
    set_heading(ax, *_heading(measure, subject, history, report, data), sure + bands)
    return figure, ax


def _draw_order(figure: Any, ax: Any, names: Sequence[str]) -> None:
    """Draw a colour bar from the first layer to the last, with eight of the names; a legend would be too long."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shown = LinearSegmentedColormap.from_list("layers", colormaps["viridis"]([0.9 * part / 20 for part in range(21)]))
    last = len(names) - 1
    ticks = [round(last * part / 7) for part in range(8)]
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), shown), ax=ax, ticks=ticks)
    bar.ax.set_yticklabels([names[tick] for tick in ticks], fontsize=7)
    bar.ax.invert_yaxis()
    bar.set_label("layers:  input  →  output", rotation=270, labelpad=10)
