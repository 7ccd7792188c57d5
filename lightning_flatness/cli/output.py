"""Print results as tables in the terminal, and write them to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_flatness.cli.commands import Outcome

WIDTH = 120  # characters per line if the output is not a terminal


def show(outcome: Outcome) -> None:
    """Print the results as tables on stdout, and the notes on stderr."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # encodings other than UTF-8 may lack characters such as ‖
    console = Console(file=sys.stdout, markup=False, emoji=False)  # brackets in names are not markup
    if not console.is_terminal:
        console.width = WIDTH
    for result in _shown(outcome):
        console.print(result.table())
    for note in outcome.notes:
        Console(file=sys.stderr, width=WIDTH).print(Text(f"Note: {note}"))


def write(path: Path, outcome: Outcome) -> None:
    """Write the results to ``path`` as an HTML page, a JSON file or an ``.npz`` file, depending on the suffix.

    The JSON file has the numbers, and the ``.npz`` file the whole result.
    """
    if path.suffix == ".html":
        from lightning_flatness.pages import save_html

        results: list[Any] = [outcome.results] if outcome.comparison is None else [outcome.comparison, outcome.results]
        save_html(path, *results, history=outcome.history, details=outcome.details, notes=outcome.notes)
    elif path.suffix == ".json":
        text = json.dumps(_numbers(outcome), indent=2, allow_nan=False, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        (*_, result) = _shown(outcome)
        result.save(path)


def _numbers(outcome: Outcome) -> Mapping[str, Any]:
    (*_, result) = _shown(outcome)
    reports = (
        {} if outcome.comparison is None else {"reports": {n: one.to_dict() for n, one in outcome.results.items()}}
    )
    return {**result.to_dict(), **reports, "details": dict(outcome.details), "notes": list(outcome.notes)}


def _shown(outcome: Outcome) -> list[Any]:
    return [outcome.comparison] if outcome.comparison is not None else list(outcome.results.values())
