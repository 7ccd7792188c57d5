"""Create folders that no other run writes to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any


def own_folder(loggers: Sequence[Any]) -> Path | None:
    """Return the folder of this run from the first logger with a folder per run (TensorBoard, CSV), or None.

    Other loggers have only ``save_dir``, one folder for all runs. ``save_dir`` is not used, because MLflow takes every
    folder in it for an experiment.
    """
    folders = [getattr(logger, "log_dir", None) for logger in loggers]
    return next((Path(folder) for folder in folders if folder), None)


def claim(folder: Path) -> Path:
    """Create a new folder with this name. If the name is taken, append ``-v1``, ``-v2`` and so on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     [claim(Path(parent) / "spectrum").name for _ in range(3)]
        ['spectrum', 'spectrum-v1', 'spectrum-v2']
    """
    names = (f"{folder.name}-v{number}" if number else folder.name for number in count())
    return _made(folder.parent, names)


def claim_version(parent: Path) -> Path:
    """Create the next folder ``version_...`` in ``parent``, as loggers of Lightning do.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     Path(parent, "version_4").mkdir()
        ...     claim_version(Path(parent)).name
        'version_5'
    """
    matches = (re.fullmatch(r"version_(\d+)", path.name) for path in parent.glob("version_*"))
    first = 1 + max((int(match[1]) for match in matches if match), default=-1)
    return _made(parent, (f"version_{number}" for number in count(first)))


def _made(parent: Path, names: Iterable[str]) -> Path:
    """Create the first of these folders in ``parent`` that does not exist, and return it."""
    for name in names:
        folder = parent / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run has created it, maybe just now
            continue
        return folder
    raise AssertionError("There are infinitely many names.")
