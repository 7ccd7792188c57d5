"""Checks of arguments that are numbers, sequences or words (values from a fixed list, such as ``"last"``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

from lightning_flatness.errors import FlatnessError


def is_number(value: Any) -> bool:
    """Return whether a value is an ``int`` or a ``float`` but not a ``bool``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_number(value: Any) -> float | None:
    """Convert a real number to ``float``; return None for anything else, such as text or a ``bool``.

    Real numbers are those of Python and NumPy, and arrays and tensors without dimensions.

    Example:
        >>> import numpy
        >>> as_number(3), as_number(numpy.float32(0.5)), as_number(True), as_number("3")
        (3.0, 0.5, None, None)
    """
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def is_sequence(value: Any) -> bool:
    """Return whether a value is a sequence, such as a list, a tuple or Hydra's ``ListConfig``, but not text.

    Example:
        >>> from collections import deque
        >>> is_sequence((1, 2)), is_sequence(deque([1, 2])), is_sequence("12"), is_sequence({1, 2})
        (True, True, False, False)
    """
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def plain(value: Any) -> Any:
    """Convert a sequence, and all sequences inside it, to ``list``; return any other value unchanged.

    Tuples stay tuples, but their entries are converted. Strings are returned unchanged. The conversion is needed
    because configuration packages have list types of their own, such as Hydra's ``ListConfig``.

    Example:
        >>> from collections import UserList
        >>> plain(UserList(["conv1", ("conv2",)])), plain("last")
        (['conv1', ('conv2',)], 'last')
    """
    if not is_sequence(value):
        return value
    parts = [plain(part) for part in value]
    return tuple(parts) if isinstance(value, tuple) else parts


def as_finite(name: str, value: Any) -> float:
    """Convert a value to ``float``. Raise an error if that fails, or if the number is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for a tensor with several entries
        number = math.nan
    if not math.isfinite(number):
        raise FlatnessError(f"{name}={value!r} must be a finite number.")
    return number


def check_whole(name: str, value: Any, least: int | None = None, or_none: bool = False) -> None:
    """Raise an error unless ``value`` is an ``int`` of at least ``least``. A ``bool`` is not accepted.

    If ``least`` is None, every ``int`` is accepted. With ``or_none``, None is accepted too.
    """
    if value is None and or_none:
        return
    if not is_number(value) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f", {least} at least"
        raise FlatnessError(f"{name}={value!r} must be a whole number{bound}{', or None' if or_none else ''}.")


def check_positive(name: str, value: Any, or_none: bool = False) -> None:
    """Raise an error unless ``value`` is a positive, finite number; with ``or_none``, None is accepted too."""
    if not (value is None and or_none) and not (is_number(value) and 0 < value < math.inf):
        raise FlatnessError(f"{name}={value!r} must be a positive number{', or None' if or_none else ''}.")


def check_type(name: str, value: Any, kind: type | tuple[type, ...], give: str) -> None:
    """Raise an error unless ``value`` is an instance of ``kind``; the message says what to ``give``."""
    if not isinstance(value, kind):
        raise FlatnessError(f"{name} is a {type(value).__name__}; give {give}.")


def check_word(name: str, value: Any, words: Sequence[Any]) -> None:
    """Raise an error unless ``value`` equals one of ``words`` and has the type of that word."""
    if not any(type(value) is type(word) and value == word for word in words):
        raise FlatnessError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, words))}.")


def check_class_weight(value: Any) -> None:
    """Raise an error if class weights are a mapping, a set or text, whose entries are not weights in order."""
    if isinstance(value, (Mapping, Set, str, bytes)):
        remedy = " Give class_weight=[weights[k] for k in range(num_classes)]." if isinstance(value, Mapping) else ""
        raise FlatnessError(
            f"class_weight is a {type(value).__name__}, but must be a list or a tensor with one number for every "
            f"class, in the order of the classes.{remedy}"
        )
