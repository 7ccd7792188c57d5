"""Write results to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.pages.parts import Section
from lightning_flatness.pages.sections import (
    cautions_of,
    history_section,
    reading_of,
    section_of,
    summary_of,
)
from lightning_flatness.results import Comparison
from lightning_flatness.results.records import Record
from lightning_flatness.versions import __version__, versions

MOST_SUMMARIES = 4  # unless there are comparisons, the summary describes at most this number of results


def save_html(
    path: str | PathLike[str],
    *results: Any,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    details: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write results to one HTML page that needs no other files, and return the path of the page.

    The page says what was measured, whether the numbers are exact, how large their errors are, how to read them, and
    what must not be concluded. The page has a light and a dark mode and can be printed. Figures need matplotlib;
    if matplotlib is not installed, the page says so.

    Args:
        path: the file to write; the name must end in ``.html`` or ``.htm``.
        results: a :class:`~lightning_flatness.FlatnessReport`, a :class:`~lightning_flatness.Comparison`, a spectrum, a
            landscape, any other result of the package, or a mapping from names of networks to results.
        history: the records of a training run, from ``callback.history``.
        title: the title of the page; by default it names the networks.
        details: mapping from names to facts about how the results were computed, such as ``{"Seed": "0"}``, the name of
            a checkpoint, or ``pages.data_hash(batches)``. The page adds the versions of the packages.
        notes: sentences to show below the details, such as warnings.

    Raises:
        FlatnessError: there are neither results nor a history, an argument is not a result of this package, or the name
            of the file does not end in ``.html`` or ``.htm``.

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
        raise FlatnessError(f"save_html writes .html files, but the name '{path}' does not end in .html or .htm.")
    shown = list(_named(results))
    if not shown and not history:
        raise FlatnessError("save_html has nothing to show. Give a result or history=.")
    path.write_text(_page(shown, list(history), title, dict(details or {}), tuple(notes)), encoding="utf-8")
    return path


def _named(results: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield pairs of a network's name and a result; the name is empty for a result outside a mapping."""
    for result in results:
        is_named = isinstance(result, Mapping) and not isinstance(result, Record)
        entries = result.items() if is_named else [("", result)]
        for name, one in entries:
            if not isinstance(one, Record):
                raise FlatnessError(
                    f"save_html writes results, such as a FlatnessReport, and not a {type(one).__name__}."
                )
            yield str(name), one


def _page(
    shown: list[tuple[str, Any]],
    history: list[Mapping[str, Any]],
    title: str,
    details: dict[str, str],
    notes: tuple[str, ...],
) -> str:
    """Render the template ``report.html.j2``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    results = [result for _, result in shown]
    compared = [result for result in results if isinstance(result, Comparison)]
    names = [name for name, _ in shown if name]
    now = datetime.now().astimezone()
    short = [("", one) for one in compared] or shown[:MOST_SUMMARIES]
    found = [*(section_of(name, result) for name, result in shown), *([history_section(history)] if history else [])]
    how = Section("How the results were computed", (*details.items(), ("Versions", versions())), points=notes)
    templates = PackageLoader("lightning_flatness", "pages")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        title=title or _title(list(dict.fromkeys(names)), bool(compared)),
        version=__version__,
        date=f"{now.day} {now:%B %Y, %H:%M %Z}",
        summary=[sentence for name, result in short for sentence in summary_of(name, result)],
        cautions=cautions_of(results, bool(history)),
        # Readers need "How to read it" directly below the first numbers.
        sections=[*found[:1], Section("How to read it", points=reading_of(results, bool(history))), *found[1:], how],
    )


def _title(names: Sequence[str], is_comparison: bool) -> str:
    start = "Comparison of" if is_comparison else "Flatness of"
    if not names:
        return f"{start} {'networks' if is_comparison else 'a network'}"
    *others, last = names
    return f"{start} {', '.join(others)} and {last}" if others else f"{start} {last}"
