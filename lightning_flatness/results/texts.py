"""Write numbers, names and tables as text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

# If a sentence would list many names, it lists this number of names and states the number of the others.
MOST_NAMES = 3
DATA = {"val": "validation data", "train": "training data", "test": "test data", "given": "given data"}
CELL = "padding: 0.2em 0.8em; white-space: nowrap"


def number_of(number: int, noun: str) -> str:
    """Return a number and its noun in the singular or plural, such as ``"2 probes"``."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def samples_of(num_samples: int, data: str | None = "") -> str:
    """Return a text with the number of samples (left out if zero) and the name of the data (left out if empty).

    Example:
        >>> samples_of(1300, "train"), samples_of(0, "val, loader 1"), samples_of(1)
        ('1,300 samples of training data', 'validation data, loader 1', '1 sample')
    """
    kind, comma, rest = (data or "").partition(", ")
    name = DATA.get(kind, kind) + comma + rest
    return " of ".join(filter(None, (number_of(num_samples, "sample") if num_samples else "", name)))


def measured(value: float, sampling_error: float = math.nan, standard_error: float = 0.0) -> str:
    """Return a number as text with its errors, or a dash if the number is NaN.

    ``sampling_error`` is the standard error over samples; it is shown if it is positive, and both it and the value are
    finite. ``standard_error`` is the standard error that random probes cause; it is shown if it is positive and finite.

    Example:
        >>> measured(1.2345, 0.0421), measured(1234.5, 62.0), measured(1.2345, standard_error=0.1), measured(math.nan)
        ('1.23 ± 0.04', '1234 ± 62', '1.234 (est. ± 0.1)', '-')
    """
    if math.isnan(value):
        return "-"
    known = math.isfinite(sampling_error) and sampling_error > 0 and math.isfinite(value)
    text = _with_error(value, sampling_error) if known else f"{value:.4g}"
    return text + (f" (est. ± {standard_error:.1g})" if 0 < standard_error < math.inf else "")


def _with_error(value: float, error: float) -> str:
    """Return a value and its error as text, with as many digits as the error makes meaningful."""
    first, _, leading = f"{error:.1e}".partition("e")
    digits = (first[0] == "1") - int(leading)  # an error that begins with 1 gets two digits
    if digits <= 0:
        return f"{value:.0f} ± {error:.0f}" if abs(value) < 1e6 else f"{value:.4g} ± {error:.1g}"
    if digits <= 5:
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    shown = max(1, min(6, math.floor(math.log10(abs(value))) + digits)) if value else 1
    return f"{value:.{shown - 1}e} ± {error:.0e}"


def named(names: Iterable[str]) -> str:
    """Return names as part of a sentence; of five names or more, the first three and the number of the others.

    Example:
        >>> named(["a", "b"]), named("abcdef")
        ('a, b', 'a, b, c and 3 others')
    """
    names = list(names)
    others = len(names) - MOST_NAMES
    return ", ".join(names) if others < 2 else f"{', '.join(names[:MOST_NAMES])} and {others} others"


def as_text(table: Table, width: int = 110) -> str:
    """Return a ``rich`` table as plain text, at most ``width`` characters wide."""
    console = Console(width=width, color_system=None, markup=False, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def as_html(table: Table) -> str:
    """Return a ``rich`` table as HTML that needs no style sheet and takes its colours from the page.

    Example:
        >>> as_html(Table("layer", title="a < b")).partition("</caption>")[0].rpartition(">")[-1]
        'a &lt; b'
    """
    style = "text-align: left; font-weight: bold; color: inherit"
    title = f'<caption style="{style}">{_html(table.title)}</caption>' if table.title else ""
    headings = "".join(_cell("th", column.header, column.justify) for column in table.columns)
    head = f"<thead><tr>{headings}</tr></thead>" if table.show_header else ""
    columns = [[_cell("td", cell, column.justify) for cell in column.cells] for column in table.columns]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    caption = f'<p style="max-width: 60em; opacity: 0.8">{_html(table.caption)}</p>' if table.caption else ""
    return (
        '<div><table style="border-collapse: collapse; color: inherit; background: none">'
        f"{title}{head}<tbody>{body}</tbody></table>{caption}</div>"
    )


def _cell(tag: str, content: Any, justify: str) -> str:
    """Return a cell of an HTML table; ``tag`` is ``th`` or ``td``, and ``justify`` the alignment."""
    side = "right" if justify == "right" else "left"
    weight = "; border-bottom: 1px solid currentColor" if tag == "th" else ""
    return f'<{tag} style="{CELL}; text-align: {side}{weight}">{_html(content)}</{tag}>'


def _html(content: Any) -> str:
    """Return text as HTML, with special characters escaped and line breaks as ``<br>``."""
    return escape(str(content)).replace("\n", "<br>")
