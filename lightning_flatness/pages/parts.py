"""The parts of a page as frozen values: sections of facts, tables, figures and sentences."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import table as rich_table

from lightning_flatness.errors import FlatnessError

# A drawing with more bytes than this, such as a filled plane, is written as pixels.
MOST_BYTES = 400_000
PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Head:
    """The heading of a column."""

    text: str
    right: bool = False


@dataclass(frozen=True)
class Table:
    """A table; a folded one is opened by a click on its title."""

    heads: tuple[Head, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure as a data URI, with a caption that can stand for it. A dark page inverts it unless it is filled."""

    source: str
    caption: str
    filled: bool = False


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    sentences: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


def table_of(table: rich_table.Table, caption: str | None = None) -> Table:
    """Return a table of a terminal as one of a page; a ``caption`` replaces its own.

    Example:
        >>> table = rich_table.Table("layer", title="a title")
        >>> table.add_row("conv1")
        >>> table_of(table).rows
        (('conv1',),)
    """
    heads = tuple(Head(str(column.header), column.justify == "right") for column in table.columns)
    rows = tuple(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    text = str(table.caption or "") if caption is None else caption
    return Table(heads, rows, text, str(table.title or ""))


def drawn(
    draw: Callable[[], tuple[Any, Any]], caption: str, filled: bool = False
) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    """Draw a figure; return it, or the reason why there is none, each as a tuple."""
    try:
        figure, _ = draw()
    except FlatnessError as error:
        return (), (f"No figure: {error}",)
    return (Figure(_data_uri(figure), caption, filled),), ()


def _data_uri(figure: Any) -> str:
    """Return a figure of matplotlib as a data URI: as a drawing, or as pixels where that would be large."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "lightning-flatness", "svg.fonttype": "path"}):
        drawing = io.BytesIO()
        figure.savefig(drawing, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    if len(drawing.getvalue()) <= MOST_BYTES:
        return _encoded("svg+xml", drawing.getvalue())
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", transparent=True, bbox_inches="tight", dpi=PIXELS_PER_INCH)
    return _encoded("png", pixels.getvalue())


def _encoded(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
