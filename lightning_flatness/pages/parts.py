"""Frozen classes for the parts of a page: sections, tables and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import table as rich_table

from lightning_flatness.errors import FlatnessError

# A figure is written as PNG if its SVG has more bytes than this, which happens with filled contours.
MOST_BYTES = 400_000
PIXELS_PER_INCH = 160


@dataclass(frozen=True)
class Head:
    """The heading of a table column. If ``right`` is True, the column is aligned to the right."""

    text: str
    right: bool = False


@dataclass(frozen=True)
class Table:
    """A table. If it is ``folded``, the page shows only its title until the reader clicks on the title."""

    heads: tuple[Head, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """An image as a data URI (``source``), with a caption that is also the alternative text.

    In dark mode the page inverts the colours of the image, unless the figure is ``filled``, i.e. has filled contours.
    """

    source: str
    caption: str
    filled: bool = False


@dataclass(frozen=True)
class Section:
    """A section of a page. ``facts`` are pairs of a name and a text, and ``points`` are the items of a list."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    sentences: tuple[str, ...] = ()
    points: tuple[str, ...] = ()


def table_of(table: rich_table.Table, caption: str | None = None) -> Table:
    """Convert a ``rich`` table to a table for a page. If ``caption`` is given, it replaces the table's own caption.

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
    """Call ``draw`` and return the figure that it draws, or the reason why it cannot draw one.

    The result is ``(figure,), ()``. If ``draw`` raises a FlatnessError, the result is ``(), (reason,)``.
    """
    try:
        figure, _ = draw()
    except FlatnessError as error:
        return (), (f"No figure: {error}",)
    return (Figure(_data_uri(figure), caption, filled),), ()


def _data_uri(figure: Any) -> str:
    """Return a matplotlib figure as a data URI in SVG, or in PNG if the SVG has more than ``MOST_BYTES``."""
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
