"""Checks of arguments that are numbers or words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError


def is_number(value: Any) -> bool:
    """Whether a value is an ``int`` or ``float``, and not a ``bool``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int | None = None, or_none: bool = False) -> None:
    """Refuse what is not a whole number.

    Args:
        name: of the argument, for the message.
        value: to check; a ``bool`` is not a number.
        least: smallest number that is accepted; None for any.
        or_none: accept None, too.

    Raises:
        FlatnessError: naming the argument and its value.

    Example:
        >>> check_whole("steps", 3, least=1)
        >>> check_whole("seed", True)
        Traceback (most recent call last):
        ...
        lightning_flatness.errors.FlatnessError: seed=True must be a whole number.
    """
    if value is None and or_none:
        return
    if not is_number(value) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f", {least} at least"
        raise FlatnessError(f"{name}={value!r} must be a whole number{bound}{', or None' if or_none else ''}.")


def check_positive(name: str, value: Any, or_none: bool = False) -> None:
    """Refuse what is not a positive, finite number.

    Raises:
        FlatnessError: naming the argument and its value.

    Example:
        >>> check_positive("tolerance", 1e-3)
    """
    if not (value is None and or_none) and not (is_number(value) and 0 < value < math.inf):
        raise FlatnessError(f"{name}={value!r} must be a positive number{', or None' if or_none else ''}.")


def check_word(name: str, value: Any, words: Sequence[Any]) -> None:
    """Refuse what is none of the known words, of the same type.

    Raises:
        FlatnessError: naming the argument, its value and the words.

    Example:
        >>> check_word("norm", 2, (1, 2))
    """
    if not any(type(value) is type(word) and value == word for word in words):
        raise FlatnessError(f"{name}={value!r} is not known; there are {', '.join(map(repr, words))}.")
