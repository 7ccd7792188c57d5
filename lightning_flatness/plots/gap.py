"""Draw an outcome of several models, such as the generalisation gap, against a measure, such as relative flatness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_logarithm, plain_frame
from lightning_flatness.plots.comparison import (
    BARS,
    DRAWN,
    cautions_of,
    draw_models,
    has_errors,
    head,
    is_logarithmic,
    label_with_unit,
    name_of,
    subject_of_models,
)
from lightning_flatness.plots.words import check_measure, known_error
from lightning_flatness.results import Comparison, number_of
from lightning_flatness.results.rank_correlation import BEST

# Dots are named only up to this number of models.
MOST_NAMES = 12
NAME_SIZE = 7
# Places of a name beside its dot, in points: offset to the right and above, and alignment.
PLACES = ((5, 4, "left"), (-5, 4, "right"), (5, -9, "left"), (-5, -9, "right"), (0, 5, "center"), (0, -11, "center"))


def plot_gap(comparison: Comparison, measure: str = BEST, *, ax: Any = None) -> tuple[Any, Any]:
    """Draw an outcome of every model, such as its generalisation gap, against a measure; the title has Kendall's τ.

    Values of the measure that are not exact have hollow dots. Error bars are two standard errors. The axis of the
    measure is logarithmic if its values are positive and the largest is more than three times the smallest.

    Args:
        comparison: the result of :func:`~lightning_flatness.compare` with ``outcome=``.
        measure: name of the number to draw: a measure of flatness, a loss, the accuracy, or a baseline such as
            ``"weight_norm"``; by default normalised relative flatness.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: there is no measure of this name, no model has both an outcome and a value of the measure, or
            matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import compare
        >>> nets, batch = {name: torch.nn.Linear(2, 3) for name in "ab"}, (torch.randn(6, 2), torch.arange(6) % 3)
        >>> comparison = compare(nets, [batch], layers="classifier", outcome={"a": 0.1, "b": 0.2}, outcome_name="gap")
        >>> figure, ax = plot_gap(comparison, "relative_flatness")
        >>> ax.get_ylabel()
        'gap'
    """
    check_type("comparison", comparison, Comparison, "a Comparison, as of compare()")
    check_measure(measure, DRAWN)
    rows = [
        row for row in comparison.models.values() if math.isfinite(row.outcome) and math.isfinite(getattr(row, measure))
    ]
    if not rows:
        raise FlatnessError(
            f"No model has both an outcome and a finite {measure}. If outcomes are missing, give compare(outcome=); "
            "otherwise choose another measure=."
        )
    given = ax
    figure, ax = axes_or_new(ax, 6.0, 4.6)
    values = [getattr(row, measure) for row in rows]
    if is_logarithmic(values):
        ax.set_xscale("log")
    draw_models(ax, rows, measure, [row.outcome for row in rows])
    if is_logarithmic(values):
        label_logarithm(ax.xaxis)
    if len(rows) <= MOST_NAMES:
        dots = [(getattr(row, measure), row.outcome) for row in rows]
        _write_names(ax, [row.name for row in rows], dots, [2 * known_error(row.errors.get(measure)) for row in rows])
    ax.set_xlabel(label_with_unit(measure))
    ax.set_ylabel(comparison.outcome_name)
    plain_frame(ax, "both")
    heading = f"{comparison.outcome_name[:1].upper()}{comparison.outcome_name[1:]} against {name_of(measure)}"
    tau, bars = _tau(comparison, measure), BARS * has_errors(rows, measure)
    head(figure, given, heading, tau, subject_of_models(comparison), cautions_of(comparison), bars)
    return figure, ax


def _write_names(ax: Any, names: Sequence[str], dots: Sequence[tuple[float, float]], errors: Sequence[float]) -> None:
    """Write a name beside every dot, at the place where it overlaps the fewest dots, error bars and earlier names."""
    ax.get_xlim(), ax.get_ylim()  # these calls make matplotlib compute the limits, which ax.transData needs

    def points(x: float, y: float) -> tuple[float, float]:
        return tuple(ax.transData.transform((x, y)) * 72 / ax.figure.dpi)

    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in (points(*dot) for dot in dots)]
    for (x, y), error in zip(dots, errors, strict=True):
        (right, height), (middle, _) = points(x + error, y), points(x, y)
        taken.append((2 * middle - right, height - 1, right, height + 1))
    for name, dot in zip(names, dots, strict=True):
        boxes = [_box(points(*dot), place, 0.55 * NAME_SIZE * len(name)) for place in PLACES]
        best = min(range(len(PLACES)), key=lambda index: sum(_overlap(boxes[index], other) for other in taken))
        taken.append(boxes[best])
        right, above, align = PLACES[best]
        at = {"xytext": (right, above), "textcoords": "offset points", "fontsize": NAME_SIZE, "ha": align}
        ax.annotate(name, dot, **at)


def _box(dot: tuple[float, float], place: tuple[int, int, str], width: float) -> tuple[float, float, float, float]:
    """Return the bounding box (left, lower, right, upper) of a name beside a dot, in points of 1/72 inch."""
    left = dot[0] + place[0] - {"left": 0.0, "center": width / 2, "right": width}[place[2]]
    lower = dot[1] + place[1]
    return left, lower, left + width, lower + NAME_SIZE


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tau(comparison: Comparison, measure: str) -> str:
    """Return a text with Kendall's τ of ``measure`` and its interval; empty if the comparison has no such τ."""
    found = next((one for one in comparison.correlations if one.measure == measure), None)
    if found is None:
        return ""
    if math.isnan(found.tau):
        return "Kendall's τ is not defined"
    interval = f" {found.interval}" if found.interval else ", too few models to conclude anything"
    return f"Kendall's τ = {found.tau:.2f}{interval}, {number_of(found.num_models, 'model')}"
