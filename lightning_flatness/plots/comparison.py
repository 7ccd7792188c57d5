"""Draw a comparison of models. ``gap.py`` draws its axes with functions of this module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import (
    LEGEND_SIZE,
    TITLE_SIZE,
    axes_or_new,
    broken,
    draw_dots,
    label_logarithm,
    plain_frame,
    set_heading,
)
from lightning_flatness.plots.words import METHODS, NAMES, check_measure, finite, known_error
from lightning_flatness.results import ComparedModel, Comparison, number_of
from lightning_flatness.results.rank_correlation import BEST
from lightning_flatness.results.texts import samples_of

LABELS = NAMES | {
    "relative_flatness_per_loss": "relative flatness / loss",
    "relative_flatness_per_curvature": "relative flatness / curvature",
    "train_loss": "training loss",
    "weight_norm": "‖W‖",
    "margin": "margin",
    "feature_spread": "features x spread",
}
# Numbers that can be drawn. The first five are computed from the Hessian (_OF_HESSIAN). Only these can be inexact.
DRAWN = (
    "normalized_relative_flatness", "relative_flatness", "relative_flatness_per_loss",
    "relative_flatness_per_curvature", "hessian_trace", "loss", "train_loss", "accuracy", "weight_norm", "margin",
    "feature_spread",
)  # fmt: skip
BARS = "bars: ± 2 standard errors"


def plot_comparison(
    comparison: Comparison, measures: str | Sequence[str] | None = None, *, ax: Any = None
) -> tuple[Any, list[Any]]:
    """Draw every model as a dot, with one panel for each measure; dots of numbers that are not exact are hollow.

    An axis is logarithmic if its values are positive and the largest is more than three times the smallest. Error bars
    are two standard errors. A dotted line marks the value of the reference, which is the first model. The sign ≈ marks
    models that differ from the reference by at most two standard errors of the difference.

    Args:
        comparison: the result of :func:`~lightning_flatness.compare`.
        measures: name or names of the numbers to draw: measures of flatness, losses, the accuracy, or baselines such as
            ``"weight_norm"``. By default normalised and plain relative flatness, the Hessian trace, the training loss
            and the loss, as far as they are known.
        ax: axes to draw into, for a single measure. If ``measures`` are not given, only the first default measure
            that is known is drawn.

    Returns:
        The figure and a list of its axes.

    Raises:
        FlatnessError: there is no measure of this name, no model has a value of a measure, ``ax`` is given for several
            measures, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import compare
        >>> nets, batch = {name: torch.nn.Linear(2, 3) for name in "ab"}, (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, axes = plot_comparison(compare(nets, [batch], layers="classifier"), ["hessian_trace", "loss"])
        >>> len(axes)
        2
    """
    check_type("comparison", comparison, Comparison, "a Comparison, as of compare()")
    rows = list(comparison.models.values())
    chosen = (
        [measures] if isinstance(measures, str) else list(measures or _default_measures(comparison, ax is not None))
    )
    for measure in chosen:
        check_measure(measure, DRAWN)
        if not finite(getattr(row, measure) for row in rows):
            raise FlatnessError(f"{measure} is not known for any model; choose other measures=.")
    if ax is not None and len(chosen) > 1:
        raise FlatnessError(
            f"ax= has room for one measure, and measures= has {len(chosen)}. Give one measure, or leave out ax=."
        )
    figure, axes = _panels(ax, len(chosen), len(rows))
    unclear = [_draw_panel(panel, comparison, measure) for panel, measure in zip(axes, chosen, strict=True)]
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=LEGEND_SIZE)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    reference = comparison.reference
    marks = [BARS] * any(has_errors(rows, measure) for measure in chosen)
    marks += [f"≈: no clear difference from {reference}"] * any(unclear) + [f"dotted: {reference}"]
    lines = subject_of_models(comparison), comparison.verdict, cautions_of(comparison), "; ".join(marks)
    head(figure, axes[0] if ax is not None else None, *lines)
    return figure, axes


def _default_measures(comparison: Comparison, alone: bool) -> list[str]:
    rows = comparison.models.values()
    wanted = [BEST, "relative_flatness", "hessian_trace", "train_loss", "loss"]
    known = [measure for measure in wanted if any(not math.isnan(getattr(row, measure)) for row in rows)]
    if "train_loss" in known and all(row.train_loss == row.loss for row in rows):
        known.remove("loss")
    return known[:1] if alone else known


def _panels(ax: Any, number: int, models: int) -> tuple[Any, list[Any]]:
    height = min(1.7 + 0.25 * max(models, 3), 12.0)
    if number == 1:
        figure, ax = axes_or_new(ax, 6.5, height)
        return figure, [ax]
    figure, axes = axes_or_new(None, 2.5 + 2.1 * number, height, ncols=number, sharey=True)
    return figure, list(axes)


def _draw_panel(ax: Any, comparison: Comparison, measure: str) -> bool:
    """Draw one number of all models; return whether a model is marked as not clearly different from the reference."""
    rows = list(comparison.models.values())
    values = [getattr(row, measure) for row in rows]
    if is_logarithmic(values):
        ax.set_xscale("log")
    if math.isfinite(values[0]):
        ax.axvline(values[0], color="0.6", linewidth=0.8, linestyle=":")
    draw_models(ax, rows, measure, list(range(len(rows))))
    if is_logarithmic(values):
        label_logarithm(ax.xaxis)
    is_marked = False
    for index, row in enumerate(rows):
        if not math.isfinite(values[index]):
            ax.annotate("not known", (0.02, index), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        elif index and measure in comparison.covariances and _is_unclear(comparison, measure, row.name):
            at = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": LEGEND_SIZE}
            ax.annotate("≈", (values[index], index), **at)
            is_marked = True
    ax.set_xlabel(label_with_unit(measure), fontsize=LEGEND_SIZE)
    ax.tick_params(axis="x", labelsize=7)
    plain_frame(ax, "both")
    return is_marked


def _is_unclear(comparison: Comparison, measure: str, name: str) -> bool:
    found = comparison.difference(measure, name)
    return found.is_known and not found.is_clear


def draw_models(ax: Any, rows: Sequence[ComparedModel], measure: str, heights: Sequence[float]) -> None:
    """Draw a dot and a horizontal error bar for every model; the dot of a flatness value that is not exact is hollow.

    The dot of model ``i`` is at height ``heights[i]``.
    """
    values = [getattr(row, measure) for row in rows]
    errors = [2 * known_error(row.errors.get(measure)) for row in rows]
    draw_dots(ax, values, heights, errors, [row.exact or measure not in _OF_HESSIAN for row in rows])


_OF_HESSIAN = DRAWN[:5]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether all values are positive and the largest is more than three times the smallest."""
    known = finite(values)
    return bool(known) and max(known) > 3 * min(known) > 0


def subject_of_models(comparison: Comparison) -> str:
    """Return a line for the title: the number of models, the layers, the samples, and whether the numbers are exact."""
    rows = list(comparison.models.values())
    layers = " / ".join(dict.fromkeys(", ".join(row.layers[:3]) + ", ..." * (len(row.layers) > 3) for row in rows))
    samples = " / ".join(dict.fromkeys(samples_of(row.num_samples, row.data) for row in rows))
    methods = " / ".join(dict.fromkeys(_words(row.method) for row in rows))
    exact = [row.exact for row in rows]
    label = "exact" if all(exact) else "not exact where hollow" if any(exact) else "not exact"
    plural = "s" if any(len(row.layers) > 1 for row in rows) or " / " in layers else ""
    return f"{number_of(len(rows), 'model')}, layer{plural} {layers}; {samples}; {label} ({methods})"


def _words(methods: str) -> str:
    return ", ".join(METHODS.get(method, method) for method in methods.split(", "))


def has_errors(rows: Iterable[ComparedModel], measure: str) -> bool:
    """Return whether the standard error of a number is known for at least one model, so that error bars are drawn."""
    return any(known_error(row.errors.get(measure)) for row in rows)


def cautions_of(comparison: Comparison) -> str:
    """Return the short texts of a comparison's cautions in one line; return an empty text if there are no cautions."""
    return f"CAUTION: {'; '.join(dict.fromkeys(one.short for one in comparison.cautions))}" * bool(comparison.cautions)


def name_of(measure: str) -> str:
    """Return the name of a measure as it is written on figures."""
    return LABELS.get(measure, measure)


def label_with_unit(measure: str) -> str:
    """Return the name of a measure with its unit, for the label of an axis."""
    units = {"hessian_trace": "  (loss per squared weight)"}
    has_unit = "flatness" in measure and "per_" not in measure
    return name_of(measure) + units.get(measure, "  (unit: loss)" if has_unit else "")


def head(figure: Any, ax: Any, *lines: str) -> None:
    """Write lines as the title of ``ax``, or of the whole figure if ``ax`` is None."""
    if ax is not None:
        set_heading(ax, *lines)
        return
    characters = int(0.93 * figure.get_figwidth() / (0.52 * TITLE_SIZE / 72))
    rows = [row for line in lines for row in broken(line, characters)]
    figure.suptitle("\n".join(rows), fontsize=TITLE_SIZE, x=0.01, ha="left")
