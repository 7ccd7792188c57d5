"""The errors of the package. Their messages name the culprit, the reason and a remedy."""

from __future__ import annotations

from typing import Any


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
    """A point of a landscape failed; ``result`` is what was computed so far, to be passed as ``resume=``, or None."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def explained(error: Exception) -> FlatnessError | None:
    """An error of autograd with its reason and remedy in plain words; None if there is nothing to add."""
    if "use_reentrant" in str(error):
        return LayerSelectionError(
            "The forward uses gradient checkpointing of the reentrant kind, which autograd cannot follow to chosen "
            "tensors. Use checkpoint(..., use_reentrant=False), or checkpoint only `if self.training`."
        )
    if "modified by an inplace operation" in str(error):
        return LayerSelectionError(
            f"The forward changes a tensor in place that autograd needs ({error}). Use the out-of-place operation "
            "there, e.g. x = x + y for x += y."
        )
    return None


def in_one_line(error: Exception) -> str:
    """The message of an error, with its type in front unless it is an error of this package."""
    return str(error) if isinstance(error, FlatnessError) else f"{type(error).__name__}: {error}"
