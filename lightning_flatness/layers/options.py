"""What to measure and how, checked before any model is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import CrossEntropy, Loss, find_loss

MEASURES = ("hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness")


@dataclass(frozen=True)
class Options:
    """Arguments of a measurement; :func:`~lightning_flatness.measure_flatness` explains them.

    Raises:
        FlatnessError: one that cannot be.

    Example:
        >>> Options(layers="all", loss="mse").diagonal
        False
    """

    layers: str | Sequence[str] = "last"
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weight: Sequence[float] | Tensor | None = None
    ignore_index: int = -100
    measures: Sequence[str] = MEASURES
    tolerance: float = 0.01
    residual: Literal["hutchinson"] | None = None
    num_probes: int = 16
    seed: int = 0
    strict: bool = False
    dtype: Literal["float32", "float64"] | torch.dtype | None = None
    loss_function: Loss = field(default_factory=CrossEntropy, init=False)

    def __post_init__(self) -> None:
        loss = find_loss(self.loss, self.label_smoothing, self.class_weight, self.ignore_index)
        object.__setattr__(self, "loss_function", loss)
        names = [self.layers] if isinstance(self.layers, str) else self.layers
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise FlatnessError(
                f"layers={self.layers!r}: give 'last', 'all', 'classifier', or names or glob patterns of convolutions "
                "and linear layers."
            )
        unknown = [name for name in self.measures if name not in MEASURES]
        if isinstance(self.measures, str) or unknown or not self.measures:
            raise FlatnessError(f"measures={self.measures!r}: give some of {', '.join(MEASURES)}.")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < 1:
            raise FlatnessError(
                f"tolerance={self.tolerance!r}: give the relative standard error that is accepted with many classes, "
                "e.g. 0.01, or 0 for all classes."
            )
        if self.residual not in (None, "hutchinson"):
            raise FlatnessError(f"residual={self.residual!r}: give None or 'hutchinson'.")
        if not isinstance(self.seed, int) or not isinstance(self.num_probes, int):
            raise FlatnessError(f"seed={self.seed!r} and num_probes={self.num_probes!r} must be whole numbers.")
        if self.residual and self.num_probes < 2:
            raise FlatnessError(f"num_probes={self.num_probes!r}: a standard error needs two probes at least.")
        measuring_dtype(self.dtype)

    @property
    def measuring_dtype(self) -> torch.dtype | None:
        """What the model is run in; None for its own, at least float32."""
        return measuring_dtype(self.dtype)

    @property
    def diagonal(self) -> bool:
        """Whether the diagonal of the block traces is enough for the measures."""
        return "relative_flatness" not in self.measures


def measuring_dtype(dtype: Any) -> torch.dtype | None:
    """What ``dtype=`` asks for; None for the model's own, at least float32.

    Raises:
        FlatnessError: another type.

    Example:
        >>> measuring_dtype("float64")
        torch.float64
    """
    known: dict[Any, torch.dtype | None] = {None: None, "float32": torch.float32, "float64": torch.float64}
    known |= {torch.float32: torch.float32, torch.float64: torch.float64}
    try:
        return known[dtype]
    except (KeyError, TypeError):  # what cannot be a key
        raise FlatnessError(
            f"dtype={dtype!r}: give 'float32' or 'float64', or None for the model's own, at least float32."
        ) from None
