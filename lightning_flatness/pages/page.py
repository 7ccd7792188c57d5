"""Write results to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.pages.parts import Section
from lightning_flatness.pages.sections import (
    cautions_of,
    check_result,
    history_section,
    reading_of,
    section_of,
    summary_of,
)
from lightning_flatness.results import Comparison
from lightning_flatness.results.records import Record
from lightning_flatness.versions import __version__, versions

MOST_SUMMARIES = 4  # results that the summary speaks of


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    version: str
    date: str
    summary: tuple[str, ...]
    cautions: tuple[str, ...]
    sections: tuple[Section, ...]


def save_html(
    path: str | PathLike[str],
    *results: Any,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    details: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write results to one HTML page that loads nothing, and return its path.

    The page says what was measured, how exact it is and how sure, how to read it, and what must not be concluded. It
    follows the reader's choice of light or dark, and can be printed. Figures need matplotlib; without it the page says
    so.

    Args:
        path: the file to write; its name ends in ``.html``.
        results: a :class:`~lightning_flatness.FlatnessReport`, a :class:`~lightning_flatness.Comparison`, a spectrum, a
            landscape or any other result of the package; or mappings from names of networks to results.
        history: the records of a run, ``callback.history``.
        title: the title of the page.
        details: how the results came about, by name: a checkpoint, a seed, ``pages.data_hash(batches)``. Versions are
            added.
        notes: sentences to show with them, such as warnings.

    Raises:
        FlatnessError: There is nothing to show, a result is of another kind, or the name does not end in ``.html``.

    Example:
        >>> import tempfile, torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> report = lf.measure_flatness(net, [(torch.randn(6, 4), torch.arange(6) % 3)], layers="all")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_html(f"{folder}/report.html", report, details={"Seed": "0"}).read_text()
        >>> page.startswith("<!DOCTYPE html>"), "relative flatness of 2 layers" in page
        (True, True)
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise FlatnessError(f"Pages are written to files .html, and '{path}' is not one.")
    shown = list(_named(results))
    if not shown and not history:
        raise FlatnessError("save_html has nothing to show; give a result or history=.")
    path.write_text(_rendered(_page(shown, list(history), title, dict(details or {}), tuple(notes))), encoding="utf-8")
    return path


def _named(results: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield results with the names of their networks; a name is empty if there is only one."""
    for result in results:
        is_named = isinstance(result, Mapping) and not isinstance(result, Record)
        entries = result.items() if is_named else [("", result)]
        for name, one in entries:
            check_result(one)
            yield str(name), one


def _page(
    shown: list[tuple[str, Any]],
    history: list[Mapping[str, Any]],
    title: str,
    details: dict[str, str],
    notes: tuple[str, ...],
) -> Page:
    results = [result for _, result in shown]
    compared = [result for result in results if isinstance(result, Comparison)]
    names = [name for name, _ in shown if name]
    now = datetime.now().astimezone()
    short = [("", one) for one in compared] or shown[:MOST_SUMMARIES]
    found = [*(section_of(name, result) for name, result in shown), *([history_section(history)] if history else [])]
    how = Section("How it came about", (*details.items(), ("Versions", versions())), points=notes)
    return Page(
        title=title or _title(list(dict.fromkeys(names)), bool(compared)),
        version=__version__,
        date=f"{now.day} {now:%B %Y, %H:%M %Z}",
        summary=tuple(sentence for name, result in short for sentence in summary_of(name, result)),
        cautions=cautions_of(results, bool(history)),
        # How to read numbers stands below the first ones.
        sections=(*found[:1], Section("How to read it", points=reading_of(results, bool(history))), *found[1:], how),
    )


def _title(names: Sequence[str], is_comparison: bool) -> str:
    start = "Comparison of" if is_comparison else "Flatness of"
    if not names:
        return f"{start} {'networks' if is_comparison else 'a network'}"
    *others, last = names
    return f"{start} {', '.join(others)} and {last}" if others else f"{start} {last}"


def _rendered(page: Page) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = PackageLoader("lightning_flatness", "pages")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(page=page)
