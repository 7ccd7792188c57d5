"""The errors of the package. Every error message says what is wrong, why, and what the user can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FlatnessError(ValueError):
    """Base class of all errors that ``lightning_flatness`` raises."""


class LayerSelectionError(FlatnessError):
    """A layer does not exist or cannot be measured, samples influence each other, or the forward pass is random."""


class NotClosedFormError(FlatnessError):
    """A layer does not meet the conditions of the closed form (``docs/theory.md``).

    The package catches this error where it can measure the layer by the Gauss-Newton method instead.
    """


class BatchError(FlatnessError):
    """A batch or the model's output cannot be measured because of wrong shapes, missing targets, NaN or infinity."""


class NotExactError(FlatnessError):
    """A layer's numbers would not be exactly those of the Hessian, and the user has set ``strict=True``."""


class LandscapeError(FlatnessError):
    """The loss at a point of a landscape could not be computed.

    ``result`` holds the points that were computed before the error, or None if there are none. To compute the other
    points, pass ``result`` as ``resume=`` in another call.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error was raised because a GPU or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def explained(error: Exception) -> FlatnessError | None:
    """Translate a known error of autograd into an error that names a remedy; return None for any other error."""
    if "use_reentrant" in str(error):
        return LayerSelectionError(
            "The forward pass uses reentrant gradient checkpointing, through which torch.autograd.grad cannot compute "
            "gradients. Use checkpoint(..., use_reentrant=False), or checkpoint only `if self.training`."
        )
    if "modified by an inplace operation" in str(error):
        return LayerSelectionError(
            f"The forward pass modifies in place a tensor that autograd needs ({error}). Use an out-of-place "
            "operation, such as x = x + y instead of x += y."
        )
    return None


def in_one_line(error: Exception) -> str:
    """Return the message of an error; for errors of other packages, put the name of the error's type in front."""
    return str(error) if isinstance(error, FlatnessError) else f"{type(error).__name__}: {error}"


@contextmanager
def naming(name: str, kind: str = "Layer") -> Iterator[None]:
    """In a ``with`` block, prefix the messages of this package's errors with ``{kind} '{name}': ``."""
    try:
        yield
    except FlatnessError as error:
        raise type(error)(f"{kind} '{name}': {error}") from error
