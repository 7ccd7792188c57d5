"""Options that several measurements have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_flatness.checks import check_word, plain
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Loss, find_loss

Options = TypeVar("Options", bound="MeasuringOptions")


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """The loss, its options, the ``loss_function`` made from these, and the ``dtype`` of the measurement.

    All options are checked on creation. Sequences of any type, also in fields of subclasses, are converted to lists or
    tuples.
    """

    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weight: Sequence[float] | Tensor | None = None
    ignore_index: int = -100
    dtype: Literal["float32", "float64"] | torch.dtype | None = None
    loss_function: Loss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.init:
                object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        loss = find_loss(self.loss, self.label_smoothing, self.class_weight, self.ignore_index)
        object.__setattr__(self, "loss_function", loss)
        _ = self.measuring_dtype

    @property
    def measuring_dtype(self) -> torch.dtype | None:
        """The dtype in which the model runs; None means the model's own, with half precision raised to float32."""
        known: dict[Any, torch.dtype | None] = {None: None, "float32": torch.float32, "float64": torch.float64}
        known |= {torch.float32: torch.float32, torch.float64: torch.float64}
        try:
            return known[self.dtype]
        except (KeyError, TypeError):  # TypeError: not hashable
            raise FlatnessError(
                f"dtype={self.dtype!r}: give 'float32' or 'float64', or None for the model's own dtype, with half "
                "precision raised to float32."
            ) from None


def of_keywords(options: type[Options], keywords: Mapping[str, Any]) -> Options:
    """Create options from keyword arguments. Raise an error for a name that is no option."""
    for name in keywords:
        check_word("option", name, [field.name for field in fields(options) if field.init])
    return options(**keywords)


def of_arguments(options: type[Options], arguments: Mapping[str, Any]) -> Options:
    """Create options from a function's ``locals()``. Every field gets the value of the argument of the same name."""
    return options(**{field.name: arguments[field.name] for field in fields(options) if field.init})
