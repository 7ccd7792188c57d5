"""Check the options of a landscape, and compute the coordinates of its points from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_flatness.checks import check_whole, check_word, is_number
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import NORMALIZATIONS
from lightning_flatness.model.options import MeasuringOptions

# Default range of the coordinate that multiplies Adam's second moment: positive, and symmetric around 1.
SECOND_MOMENT = (0.1, 1.9)
KINDS = ("random", "adam", "hessian")
# The words or numbers that each of these options accepts.
WORDS: dict[str, tuple[Any, ...]] = {
    "normalize": (None, *NORMALIZATIONS),
    "norm": (1, 2),
    "biases": ("zero", "scaled"),
    "update": ("add", "adam"),
    "batch_norm": ("kept", "recomputed"),
}


@dataclass(frozen=True, kw_only=True)
class LandscapeOptions(MeasuringOptions):
    """Options of :func:`~lightning_flatness.loss_landscape`, which documents them."""

    axes: Any = "random"
    normalize: Literal["none", "weight", "filter", "layer", "model"] | None = None
    norm: Literal[1, 2] = 2
    biases: Literal["zero", "scaled"] = "zero"
    update: Literal["add", "adam"] = "add"
    span: Any = 1.0
    steps: int | Sequence[int] = 25
    frozen: Sequence[str] = ()
    batch_norm: Literal["kept", "recomputed"] = "kept"
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, words in WORDS.items():
            check_word(name, getattr(self, name), words)
        check_whole("seed", self.seed, least=0)
        check_whole("chunk", self.chunk, least=1, or_none=True)
        object.__setattr__(self, "axes", as_list(self.axes))
        object.__setattr__(self, "frozen", (self.frozen,) if isinstance(self.frozen, str) else tuple(self.frozen))
        others = not all(isinstance(axis, str) and axis == "adam" for axis in self.axes)
        if self.update == "adam" and (others or self.normalize not in (None, "none")):
            raise FlatnessError("update='adam' takes axes='adam' or axes=['adam'], and no normalize=.")
        _ = self.coordinates

    @property
    def coordinates(self) -> tuple[Tensor, ...]:
        """Coordinates of the points along each axis, float64 ``(n_i,)``."""
        return grid(self.span, self.steps, len(self.axes), self.update)


def as_list(axes: Any) -> list[Any]:
    """Return one or two axes as a list. A string gives two axes of that kind, and a single direction gives one axis.

    Raise a :class:`FlatnessError` for a wrong number of axes or an unknown string.
    """
    if isinstance(axes, str):
        axes = [axes, axes]
    elif isinstance(axes, (Mapping, Tensor)):
        axes = [axes]
    if not isinstance(axes, Sequence) or not 1 <= len(axes) <= 2:
        raise FlatnessError(
            f"axes is a {type(axes).__name__}{f' of length {len(axes)}' if isinstance(axes, Sequence) else ''}; give "
            "'random', 'adam' or 'hessian' for a plane, or a list of one or two of these words or directions."
        )
    for axis in axes:
        if isinstance(axis, str):
            check_word("axes", axis, KINDS)
    return list(axes)


def grid(span: Any, steps: Any, num_axes: int, update: str) -> tuple[Tensor, ...]:
    """Return equally spaced coordinates for every axis, float64, including both ends of the axis.

    Raise a :class:`FlatnessError` if ``steps`` or ``span`` is invalid.
    """
    steps, span = _plain(steps), _plain(span)
    counts = [steps] * num_axes if is_number(steps) else steps
    if not isinstance(counts, Sequence) or len(counts) != num_axes or not all(map(_is_count, counts)):
        raise FlatnessError(
            f"{steps=} must be a whole number of points, at least two, or a list of {num_axes} such numbers."
        )
    ranges = _ranges(span, num_axes, update)
    if update == "adam" and num_axes == 2 and not ranges[1][0] > 0:
        raise FlatnessError(
            f"{span=}: with update='adam', the second coordinate is a factor under a square root, so it must be "
            f"positive. Give a pair for every axis, such as [(-1, 1), {SECOND_MOMENT}]."
        )
    return tuple(_spaced(low, high, count) for (low, high), count in zip(ranges, counts, strict=True))


def _ranges(span: Any, num_axes: int, update: str) -> list[tuple[float, float]]:
    """Return the lowest and the highest coordinate of every axis."""
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
    """Return whether an argument is a pair of finite numbers, the lower one first."""
    whole = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair))
    return whole and -math.inf < pair[0] < pair[1] < math.inf


def _spaced(low: float, high: float, count: int) -> Tensor:
    """Return ``count`` equally spaced numbers; both ends are exact, and so is 0 in the middle of a symmetric range."""
    part = torch.arange(count, dtype=torch.float64, device="cpu") / (count - 1)
    return low * (1 - part) + high * part


def _plain(value: Any) -> Any:
    """Convert numbers of NumPy or torch to numbers of Python, also within lists and tuples."""
    if isinstance(value, (list, tuple)):
        numbers = [_plain(number) for number in value]
        return numbers if isinstance(value, list) else tuple(numbers)
    return value.tolist() if hasattr(value, "tolist") else value


def _is_count(value: Any) -> bool:
    """Return whether a value is a whole number of points, two at least."""
    return is_number(value) and isinstance(value, int) and value >= 2
