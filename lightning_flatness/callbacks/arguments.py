"""Checks of what all callbacks take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_flatness.errors import FlatnessError


def check_arguments(name: str, data: Any, on_error: Any, prefix: Any) -> None:
    """Refuse arguments that cannot be.

    Args:
        name: of the callback, for messages.
        data: ``"val"``, ``"train"``, or what can be iterated many times, since it is read in every measurement.
        on_error: ``"raise"`` or ``"warn"``.
        prefix: of keys; some text.

    Raises:
        FlatnessError: the first that is wrong.
    """
    if data not in ("val", "train") if isinstance(data, str) else not _is_read_many_times(data):
        raise FlatnessError(f"{name}: data is 'val', 'train', or a DataLoader or list of batches, not {data!r}.")
    if on_error not in ("raise", "warn"):
        raise FlatnessError(f"{name}: on_error is 'raise' or 'warn', not {on_error!r}.")
    if not prefix or not isinstance(prefix, str):
        raise FlatnessError(f"{name}: prefix={prefix!r} must be a string, and not empty.")


def check_counts(name: str, or_none: bool = False, **counts: Any) -> None:
    """Refuse what is no whole number from 1 on; ``None`` may be allowed.

    Raises:
        FlatnessError: the first that is wrong.
    """
    for argument, value in counts.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole or (or_none and value is None)):
            none = ", or None" if or_none else ""
            raise FlatnessError(f"{name}: {argument}={value!r} must be a whole number, 1 at least{none}.")


def _is_read_many_times(data: Any) -> bool:
    return isinstance(data, Iterable) and not isinstance(data, Iterator)
