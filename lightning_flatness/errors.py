"""The errors of the package: each names the culprit, the reason and the remedy."""

from __future__ import annotations

from typing import Any


def is_out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


class FlatnessError(ValueError):
    """Base class of every error raised by ``lightning_flatness``."""


class LayerSelectionError(FlatnessError):
    """A layer cannot be found or measured, or samples mix, or the forward is random."""


class NotClosedFormError(FlatnessError):
    """A tail or head does not meet the conditions of the closed form; caught where another method can take over."""


class BatchError(FlatnessError):
    """A batch, or what the model makes of it, cannot be measured: wrong shapes, no targets, NaN or infinity."""


class NotExactError(FlatnessError):
    """With ``strict=True``: a number would not be the Hessian's."""


class LandscapeError(FlatnessError):
    """A point of a landscape failed; what was computed until then is in ``result``, for ``resume=``."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result
