"""The errors of the package. A message names what is wrong, the reason and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FlatnessError(ValueError):
    """Base class of all errors that ``lightning_flatness`` raises."""


class LayerSelectionError(FlatnessError):
    """A layer is not found or cannot be measured, samples are not independent, or the forward pass is random."""


class NotClosedFormError(FlatnessError):
    """A layer does not meet the conditions of the closed form. It is caught if another method can be used."""


class BatchError(FlatnessError):
    """A batch or the model's output for it cannot be measured: wrong shapes, no targets, NaN or infinity."""


class NotExactError(FlatnessError):
    """With ``strict=True``, a number of a layer would not be exactly that of the Hessian."""


class LandscapeError(FlatnessError):
    """A point of a landscape failed; ``result`` has the points computed so far (for ``resume=``), or is None."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a GPU or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def explained(error: Exception) -> FlatnessError | None:
    """Return an error that explains an error of autograd and names a remedy, or None if it is not a known one."""
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
    """Return the message of an error, preceded by its type unless it is an error of this package."""
    return str(error) if isinstance(error, FlatnessError) else f"{type(error).__name__}: {error}"


@contextmanager
def naming(name: str, kind: str = "Layer") -> Iterator[None]:
    """Put the name of a layer in front of the errors that are raised in the block."""
    try:
        yield
    except FlatnessError as error:
        raise type(error)(f"{kind} '{name}': {error}") from error
