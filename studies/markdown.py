"""Format numbers, intervals, tables and figures in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def number(value: Any, digits: int = 2) -> str:
    """Format a number with a true minus sign, which aligns in tables; return a dash if the number is unknown."""
    value = float(value) if value not in ("", None) else math.nan
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text.replace("-", "−")


def percent(value: Any, digits: int = 1) -> str:
    """Format a share, such as 0.05, in percent."""
    return f"{number(100 * float(value), digits)} %"


def interval(row: dict[str, Any], key: str, low: str = "low", high: str = "high", digits: int = 2) -> str:
    """Format a number with its interval; the number is bold if its corrected p-value is below 0.05."""
    value = number(row[key], digits)
    bold = (
        "**" if not math.isnan(float(row.get("p_holm", math.nan) or math.nan)) and float(row["p_holm"]) < 0.05 else ""
    )
    return f"{bold}{value}{bold} [{number(row[low], digits)}, {number(row[high], digits)}]"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first ``left`` columns are aligned to the left, the others to the right."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * left + "---:|" * (len(headings) - left)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def picture(name: str, words: str) -> str:
    """Return the Markdown for a figure of the study; ``words`` is its alternative text."""
    return f"![{words}](images/study/{name}.png)\n"
