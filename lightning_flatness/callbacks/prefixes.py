"""Raise an error if two callbacks of a Trainer have the same prefix of logged keys."""

from __future__ import annotations

from typing import Any

from lightning_flatness.callbacks.lightning_imports import Trainer, callbacks_of
from lightning_flatness.errors import FlatnessError

PACKAGE = __name__.partition(".")[0]


def error_of(name: str, other: str, prefix: str) -> FlatnessError:
    """Return the error for two callbacks ``name`` and ``other`` that have the same prefix."""
    pair = f"Two callbacks of the class {name}" if name == other else f"{name} and {other}"
    return FlatnessError(
        f"{pair} have the same prefix='{prefix}', so both would log under the same keys. Give each callback a prefix= "
        f"of its own, e.g. prefix='{prefix}_2'."
    )


def check_prefix(trainer: Trainer, callback: Any) -> None:
    """Raise an error if another callback of this package has the same prefix.

    A pair of callbacks is accepted if one of the two gives way, which means that it removes itself from the Trainer.
    """
    for other in callbacks_of(trainer):
        is_ours = any(base.__module__.partition(".")[0] == PACKAGE for base in type(other).__mro__)
        gives_way = getattr(callback, "gives_way", False) or getattr(other, "gives_way", False)
        if other is not callback and is_ours and not gives_way and getattr(other, "prefix", None) == callback.prefix:
            raise error_of(type(callback).__name__, type(other).__name__, callback.prefix)


class UncheckedKey(str):
    """A state key ``name[prefix=...]`` that raises an error when it is compared with an equal key.

    A Trainer compares the state keys of its callbacks before it calls any of them, and raises an error if two keys are
    equal. The message of Lightning's error does not say that callbacks need different prefixes. So this class raises an
    error earlier, in the comparison, with a message that says so.
    """

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UncheckedKey) and str(self) == str(other):
            name, prefix = self[:-1].split("[prefix=", 1)
            raise error_of(name, name, prefix)
        return str(self) == other
