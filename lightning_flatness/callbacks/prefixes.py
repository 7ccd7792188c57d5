"""Prefixes of logged keys, of which every callback of a Trainer needs its own."""

from __future__ import annotations

from typing import Any

from lightning_flatness.callbacks.lightning_imports import Trainer, callbacks_of
from lightning_flatness.errors import FlatnessError

PACKAGE = __name__.partition(".")[0]


def error_of(name: str, other: str, prefix: str) -> FlatnessError:
    """Return the error for two callbacks that have one prefix."""
    return FlatnessError(
        f"{name} and another {other} have prefix='{prefix}', under which both would log. Give each callback a prefix= "
        f"of its own, e.g. prefix='{prefix}_2'."
    )


def check_prefix(trainer: Trainer, callback: Any) -> None:
    """Raise an error if another callback of this package has the same prefix; one that gives way does not count."""
    for other in callbacks_of(trainer):
        is_ours = any(base.__module__.partition(".")[0] == PACKAGE for base in type(other).__mro__)
        gives_way = getattr(callback, "gives_way", False) or getattr(other, "gives_way", False)
        if other is not callback and is_ours and not gives_way and getattr(other, "prefix", None) == callback.prefix:
            raise error_of(type(callback).__name__, type(other).__name__, callback.prefix)


class UncheckedKey(str):
    """A state key, ``name[prefix=...]``, that raises an error when it is compared with an equal one.

    A Trainer compares the state keys of its callbacks before it calls any of them. Its own error for equal keys does
    not say that ``prefix=`` tells callbacks apart.
    """

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UncheckedKey) and str(self) == str(other):
            name, prefix = self[:-1].split("[prefix=", 1)
            raise error_of(name, name, prefix)
        return str(self) == other
