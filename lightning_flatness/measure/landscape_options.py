"""What a landscape is asked for; checked before a model is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_flatness.checks import check_whole, check_word
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import NORMALIZATIONS
from lightning_flatness.measure.grid import grid
from lightning_flatness.model.options import MeasuringOptions

KINDS = ("random", "adam", "hessian")
WORDS: dict[str, tuple[Any, ...]] = {
    "normalize": (None, *NORMALIZATIONS),
    "norm": (1, 2),
    "biases": ("zero", "scaled"),
    "update": ("add", "adam"),
    "batch_norm": ("kept", "recomputed"),
}


@dataclass(frozen=True, kw_only=True)
class LandscapeOptions(MeasuringOptions):
    """Options of :func:`~lightning_flatness.loss_landscape`, which explains them.

    Attributes:
        axes: one entry for each axis: a word of ``KINDS`` or a direction.
        frozen: patterns.
        coordinates: of the points, float64 ``(n_i,)`` for every axis.

    Raises:
        FlatnessError: an option that is not possible.

    Example:
        >>> options = LandscapeOptions(axes="random", steps=3)
        >>> options.axes, len(options.coordinates)
        (['random', 'random'], 2)
    """

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
            raise FlatnessError("update='adam' takes axes='adam' or axes=['adam'], and no normalisation.")
        _ = self.coordinates

    @property
    def coordinates(self) -> tuple[Tensor, ...]:
        """Coordinates of the points on every axis; see :func:`~lightning_flatness.measure.grid.grid`."""
        return grid(self.span, self.steps, len(self.axes), self.update)


def as_list(axes: Any) -> list[Any]:
    """The axes one by one; a word alone is a plane of two axes of that kind, a direction alone a line.

    Raises:
        FlatnessError: not one or two axes, or an unknown word.

    Example:
        >>> as_list("random"), as_list(["adam"])
        (['random', 'random'], ['adam'])
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
