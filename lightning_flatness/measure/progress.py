"""Show a progress bar in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def progress_bar(show: bool | None) -> Progress:
    """Return a progress bar on stderr. With ``show=None`` it is shown only in a terminal."""
    console = Console(stderr=True)
    show = console.is_terminal if show is None else show
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=console.is_terminal, disable=not show)
