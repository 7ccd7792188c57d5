"""Read and write CSV files; rows can be appended one by one, so that an interrupted run keeps its results."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Table:
    """A CSV file whose rows are identified by the columns ``keys``; a row is written only if its key is new."""

    def __init__(self, path: Path, *keys: str) -> None:
        self.path, self.keys = path, keys
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mend()
        self._known = {tuple(row[key] for key in keys) for row in read_rows(path)}

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._known

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file and flush the file; the first row of a file determines the columns."""
        key = tuple(str(row[name]) for name in self.keys)
        if key in self._known:
            return
        is_new = not self.path.exists() or not self.path.stat().st_size
        columns = list(row) if is_new else header_of(self.path)
        unknown = row.keys() - set(columns)
        if unknown:
            raise ValueError(f"{self.path} has no column {sorted(unknown)[0]!r}: move the file away to begin anew.")
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: shown(value) for name, value in row.items()})
            file.flush()
        self._known.add(key)

    def _mend(self) -> None:
        """Remove an incomplete last line, which an interrupted run may have left."""
        if self.path.exists():
            text = self.path.read_bytes()
            if text and not text.endswith(b"\n"):
                self.path.write_bytes(text[: text.rfind(b"\n") + 1])


def shown(value: Any) -> str:
    """Return the text of a cell: six significant digits for a float, an empty string for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def header_of(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as dicts of strings; an empty list if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the same columns to a file, replacing its content."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)


def column_of(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """Return a column as an array of floats ``(n,)``; empty and missing cells are NaN."""
    return np.array([float(row.get(name) or "nan") for row in rows], dtype=float)
