"""What all figures share: axes, panels, curves, dots with error bars, and round ticks.

The functions import matplotlib only when they are called, because it is optional. No code imports pyplot.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.words import finite

# Curves with more points than this are drawn without markers.
MOST_MARKERS = 40
# These colours differ for colour-blind readers and in a grey print. The markers differ as well.
SERIES = ("#0b3c6f", "#d1571a", "#3f9fd8", "#00805f")
MARKERS = ("o", "s", "^", "D")
# Font sizes of titles and legends.
TITLE_SIZE, LEGEND_SIZE = 9, 8


def axes_or_new(ax: Any, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return ``ax.figure`` and ``ax``; if ``ax`` is None, make a figure of ``width`` x ``height`` inches with axes."""
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise FlatnessError("Figures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**options)


def panel_below(figure: Any, ax: Any, shares: tuple[float, float]) -> Any:
    """Split the place of ``ax`` into an upper and a lower part, and return new axes in the lower part.

    ``ax`` moves to the upper part. ``shares`` are the relative heights of both parts. The two axes share the x axis.
    """
    spec = ax.get_subplotspec()
    if spec is None:  # axes outside a grid, as figure.add_axes makes them
        box, part = ax.get_position(), shares[1] / sum(shares)
        ax.set_position((box.x0, box.y0 + (part + 0.03) * box.height, box.width, (0.97 - part) * box.height))
        below = figure.add_axes((box.x0, box.y0, box.width, (part - 0.03) * box.height), sharex=ax)
    else:
        grid = spec.subgridspec(2, 1, height_ratios=shares)
        ax.set_subplotspec(grid[0])
        below = figure.add_subplot(grid[1], sharex=ax)
    ax.tick_params(axis="x", labelbottom=False)
    return below


def plain_frame(ax: Any, grid: str, hidden: Sequence[str] = ("top", "right")) -> None:
    """Hide the ``hidden`` sides of the frame, and draw light grid lines for the axis ``"x"``, ``"y"`` or ``"both"``."""
    ax.spines[list(hidden)].set_visible(False)
    ax.grid(axis=grid, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def set_heading(ax: Any, *lines: str) -> None:
    """Write lines as a left-aligned title; leave out empty lines, and wrap lines that are wider than the axes."""
    characters = int(1.05 * ax.get_window_extent().width / ax.figure.dpi / (0.52 * TITLE_SIZE / 72))
    rows = [row for line in lines for row in broken(line, max(characters, 30))]
    ax.set_title("\n".join(rows), fontsize=TITLE_SIZE, loc="left")


def broken(line: str, characters: int) -> list[str]:
    """Wrap one line of a title into rows of at most ``characters`` characters.

    Rows end after a "; " where possible. A part between two "; " is broken only if it is longer than a row.

    Example:
        >>> broken("500 samples of data; exact (Gauss-Newton, closed form)", 40)
        ['500 samples of data;', 'exact (Gauss-Newton, closed form)']
    """
    rows: list[str] = []
    for part in line.split("; "):
        if rows and len(f"{rows[-1]}; {part}") <= characters:
            rows[-1] += f"; {part}"
            continue
        rows[-1:] = [f"{row};" for row in rows[-1:]]
        rows += textwrap.wrap(part, characters) or [part] * bool(part)
    return rows


def overlays(ax: Any, kind: str) -> list[Any]:
    """Return the curves in ``ax`` that :func:`set_joint_heading` marked with ``kind``, in drawing order."""
    return [line for line in ax.lines if (line.get_gid() or "").partition("\n")[0] == kind]


def set_joint_heading(ax: Any, kind: str, curve: Any, *lines: str) -> None:
    """Write one title for all curves in the axes that have the same ``kind``, such as ``"loss"`` or ``"density"``.

    ``curve`` is the newest curve of this kind, and ``lines`` is its title. The kind and the title of the curve are
    stored in the ``gid`` of the curve. Every line of a title consists of parts, separated by "; ". If the curves differ
    in a part, the joint title has all versions of this part, with slashes between them.
    """
    curve.set_gid("\n".join((kind, *lines)))
    headings = [line.get_gid().split("\n")[1:] for line in overlays(ax, kind)]
    parts = [[line.split("; ") for line in same] for same in zip(*headings, strict=True)]
    joint = ["; ".join(" / ".join(dict.fromkeys(same)) for same in zip(*several, strict=True)) for several in parts]
    set_heading(ax, *joint)


def plot_over_epochs(
    ax: Any,
    epochs: Sequence[float],
    values: Sequence[float | None],
    exact: Sequence[bool] | None = None,
    **style: Any,
) -> None:
    """Draw a curve over epochs, with a gap where a value is None, and with markers if the curve has few points.

    Where an entry of ``exact`` is False, the curve is dashed and its markers are hollow.
    """
    numbers = [math.nan if value is None else value for value in values]
    flags = [True] * len(numbers) if exact is None else list(exact)
    marker = style.pop("marker", "o")
    if len(epochs) > MOST_MARKERS:
        marker = None
    if any(flags) or not numbers:
        solid = [number if flag else math.nan for number, flag in zip(numbers, flags, strict=True)]
        ax.plot(epochs, solid, marker=marker, **style)
        style.pop("label", None)
    if not all(flags):
        # The curve is solid only between two exact values. So the dashed curve includes the exact values beside values
        # that are not exact.
        padded = [True, *flags, True]
        near = [not all(padded[index : index + 3]) for index in range(len(flags))]
        dashed = [number if beside else math.nan for number, beside in zip(numbers, near, strict=True)]
        hollow = [index for index, flag in enumerate(flags) if not flag]
        ax.plot(
            epochs, dashed, **{**style, "linestyle": "--"}, marker=marker, markevery=hollow, markerfacecolor="white"
        )


def draw_dots(
    ax: Any, values: Sequence[float], heights: Sequence[float], errors: Sequence[float], exact: Sequence[bool]
) -> None:
    """Draw a dot and a horizontal error bar for every value; the dots of values that are not exact are hollow.

    The dot of value ``i`` is at height ``heights[i]``, and its bar extends by ``errors[i]`` to the left and right. A
    logarithmic axis has no zero, so bars on it are cut off a little below the smallest value.
    """
    colour = SERIES[0]
    if any(errors):
        lowest = 0.6 * min(finite(values), default=0.0) if ax.get_xscale() == "log" else -math.inf
        below = [min(error, max(value - lowest, 0.0)) for value, error in zip(values, errors, strict=True)]
        style = {"fmt": "none", "ecolor": colour, "elinewidth": 1.0, "capsize": 2.0}
        ax.errorbar(values, heights, xerr=[below, list(errors)], **style)
    for label, marker, face in (("exact", "o", colour), ("not exact", "D", "white")):
        shown = [index for index, flag in enumerate(exact) if flag == (label == "exact")]
        style = {"marker": marker, "markerfacecolor": face, "markeredgecolor": colour, "linestyle": "none"}
        if shown:
            dots = [values[index] for index in shown], [heights[index] for index in shown]
            ax.plot(*dots, markersize=5.5, zorder=3, label=label, **style)


def label_epochs(ax: Any, epochs: Sequence[float]) -> None:
    """Label the horizontal axis at whole epochs; if there is one epoch only, extend the axis by half an epoch."""
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if len(set(epochs)) == 1:
        ax.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)


def label_logarithm(axis: Any) -> None:
    """Label a logarithmic axis at round numbers.

    Labels are at 1, 2 and 5 times the powers of ten. An axis that spans less than a factor of ten has more labels. An
    axis that spans more than a factor of a thousand has labels at powers of ten only.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    digits = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(LogLocator(subs=tuple(range(2, 10))))
    axis.set_minor_formatter(NullFormatter())


def round_numbers(low: float, high: float) -> list[float]:
    """Return at most eight round numbers between two positive bounds.

    Round numbers are 1, 2 and 5 times the powers of ten. If more than eleven of them lie between the bounds, only the
    powers of ten are used. If more than eight numbers remain, only every second, third, ... number is returned.

    Example:
        >>> round_numbers(0.3, 12.0)
        [0.5, 1.0, 2.0, 5.0, 10.0]
        >>> round_numbers(0.3, 12000.0)
        [1.0, 10.0, 100.0, 1000.0, 10000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    numbers = [number for number in numbers if low <= number <= high]
    if len(numbers) > 11:  # at least four of them are powers of ten
        numbers = [number for number in numbers if f"{number:e}".startswith("1.")]
    return numbers[:: max(1, -(-len(numbers) // 8))]


def short(value: float) -> str:
    """Format a number that has few digits; a very large or very small number gets a power of ten.

    Example:
        >>> short(0.02), short(2000.0), short(1e-5), short(-1e6)
        ('0.02', '2000', '$10^{-5}$', '$-10^{6}$')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, power = f"{value:e}".split("e")
    factor = f"{float(digits):g}"
    return f"${factor[:-1] if factor in ('1', '-1') else factor + '×'}10^{{{int(power)}}}$"
