"""Show a progress bar in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def progress_bar(show: bool | None) -> Progress:
    """Return a progress bar on stderr; with ``show=None`` it is visible only in a terminal."""
    console = Console(stderr=True)
    show = console.is_terminal if show is None else show
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=console.is_terminal, disable=not show)


def length_of(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if ``batches`` has no length (a generator, for example).

    Example:
        >>> length_of([1, 2]), length_of(iter([1, 2]))
        (2, None)
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
