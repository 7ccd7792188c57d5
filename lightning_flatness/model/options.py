"""Options that all measurements take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Loss, find_loss


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """A loss and the options of cross-entropy, as for :func:`~lightning_flatness.functional.find_loss`.

    Attributes:
        loss_function: the loss that they describe.

    Raises:
        FlatnessError: an unknown loss, or options that it does not have.

    Example:
        >>> LossOptions(loss="mse").loss_function
        MeanSquaredError()
    """

    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weight: Sequence[float] | Tensor | None = None
    ignore_index: int = -100
    loss_function: Loss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        loss = find_loss(self.loss, self.label_smoothing, self.class_weight, self.ignore_index)
        object.__setattr__(self, "loss_function", loss)


def measuring_dtype(dtype: Any) -> torch.dtype | None:
    """The type that ``dtype=`` asks for; None for the model's own, at least float32.

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
    except (KeyError, TypeError):  # TypeError: not hashable
        raise FlatnessError(
            f"dtype={dtype!r}: give 'float32' or 'float64', or None for the model's own, at least float32."
        ) from None


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions(LossOptions):
    """The loss, and the type in which the model runs.

    Raises:
        FlatnessError: a loss or type that is not known.
    """

    dtype: Literal["float32", "float64"] | torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        measuring_dtype(self.dtype)

    @property
    def measuring_dtype(self) -> torch.dtype | None:
        """The type in which the model runs; None for its own, at least float32."""
        return measuring_dtype(self.dtype)
