"""The coordinates of the points of a landscape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.checks import is_number
from lightning_flatness.errors import FlatnessError

SECOND_MOMENT = (0.1, 1.9)  # symmetric around 1, and positive


def grid(span: Any, steps: Any, num_axes: int, update: str = "add") -> tuple[Tensor, ...]:
    """Equally spaced coordinates for every axis, float64; both ends are points.

    Args:
        span: ``s`` for ``-s`` to ``s``, a pair, or a pair for every axis; also numbers of NumPy, or tensors.
        steps: number of points, for all axes or for each.
        num_axes: 1 or 2.
        update: with ``"adam"`` the second axis is positive.

    Raises:
        FlatnessError: other values.

    Example:
        >>> grid(1.0, 3, 1)
        (tensor([-1.,  0.,  1.], dtype=torch.float64),)
    """
    steps, span = _plain(steps), _plain(span)
    counts = [steps] * num_axes if is_number(steps) else steps
    if not isinstance(counts, Sequence) or len(counts) != num_axes or not all(map(_is_count, counts)):
        raise FlatnessError(
            f"{steps=} must be a whole number of points, two at least, or one for each of {num_axes} axes."
        )
    ranges = _ranges(span, num_axes, update)
    if update == "adam" and num_axes == 2 and not ranges[1][0] > 0:
        raise FlatnessError(
            f"{span=}: with update='adam' the second coordinate is a factor of the second moment, whose root is taken, "
            "so it must be positive; give a pair for every axis."
        )
    return tuple(_spaced(low, high, count) for (low, high), count in zip(ranges, counts, strict=True))


def _ranges(span: Any, num_axes: int, update: str) -> list[tuple[float, float]]:
    """Both ends of every axis."""
    ranges = span if isinstance(span, Sequence) and not isinstance(span, str) else []
    if is_number(span):
        ranges = [(-span, span), SECOND_MOMENT if update == "adam" else (-span, span)][:num_axes]
    elif len(ranges) == 2 and all(map(is_number, ranges)):
        ranges = [ranges] * num_axes
    if len(ranges) != num_axes or not all(map(_is_range, ranges)):
        raise FlatnessError(
            f"{span=} must be a positive number, a pair (from, to) in order, or such a pair for every axis."
        )
    return [(low, high) for low, high in ranges]


def _is_range(pair: Any) -> bool:
    whole = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair))
    return whole and -math.inf < pair[0] < pair[1] < math.inf


def _spaced(low: float, high: float, count: int) -> Tensor:
    """Points between both ends; these are exact, and so is 0 in the middle of a symmetric range."""
    part = torch.arange(count, dtype=torch.float64, device="cpu") / (count - 1)
    return low * (1 - part) + high * part


def _plain(value: Any) -> Any:
    """Numbers of Python, from those of NumPy or torch."""
    if isinstance(value, (list, tuple)):
        numbers = [_plain(number) for number in value]
        return numbers if isinstance(value, list) else tuple(numbers)
    return value.tolist() if hasattr(value, "tolist") else value


def _is_count(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 2
