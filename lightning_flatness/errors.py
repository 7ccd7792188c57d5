"""The errors of the package. Their messages name the culprit, the reason and a remedy."""

from __future__ import annotations

from typing import Any


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


class FlatnessError(ValueError):
    """Base class of all errors that ``lightning_flatness`` raises."""


class LayerSelectionError(FlatnessError):
    """A layer is not found or cannot be measured, samples are not independent, or the forward pass is random."""


class NotClosedFormError(FlatnessError):
    """A layer does not meet the conditions of the closed form; caught where another method can be used."""


class BatchError(FlatnessError):
    """A batch or the model's output for it cannot be measured: wrong shapes, no targets, NaN or infinity."""


class NotExactError(FlatnessError):
    """With ``strict=True``, a number would not be the Hessian's."""


class LandscapeError(FlatnessError):
    """A point of a landscape failed.

    Attributes:
        result: the :class:`LandscapeResult` computed so far, to be passed as ``resume=``; None if there is none.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result
