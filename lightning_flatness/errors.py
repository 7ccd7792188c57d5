"""The errors of the package. Every error message says what is wrong, why, and what the user can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FlatnessError(ValueError):
    """Base class of all errors that ``lightning_flatness`` raises.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> try:
        ...     lf.measure_flatness(torch.nn.Linear(4, 3), [], layers="all")
        ... except lf.FlatnessError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        No sample was measured...
    """


class LayerSelectionError(FlatnessError):
    """A layer does not exist or cannot be measured, samples influence each other, or the forward pass is random.

    The message names the layer and the remedy, such as another ``layers=`` or a change of the forward pass.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> try:
        ...     lf.measure_flatness(net, [torch.randn(2, 4)], layers="1")
        ... except lf.LayerSelectionError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        layers='1' matches no convolution or linear layer of the model...
    """


class UnbuiltError(LayerSelectionError):
    """The model's forward makes parameters when it is called for the first time, and it was not called yet.

    A callback that checks the layers before training catches this error, and checks them later.
    """


class NotClosedFormError(FlatnessError):
    """A layer cannot be measured by the closed form, a formula for the Hessian's block traces (``docs/theory.md``).

    The package catches this error where it can measure the layer by the Gauss-Newton method instead.
    """


class BatchError(FlatnessError):
    """A batch or the model's output cannot be measured, e.g. because of wrong shapes, missing targets or NaN.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> try:
        ...     lf.measure_flatness(torch.nn.Linear(4, 3), [(torch.randn(2, 4), torch.tensor([1, 3]))], layers="all")
        ... except lf.BatchError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        The targets lie in 1..3, but the model has 3 classes (0..2)...
    """


class NotExactError(FlatnessError):
    """The user has set ``strict=True``, and a layer's numbers would not be exactly those of the Hessian.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
        >>> try:
        ...     lf.measure_flatness(net, [torch.randn(2, 4)], layers="0", strict=True)
        ... except lf.NotExactError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        Layer '0': only the Gauss-Newton part of its Hessian can be computed...
    """


class LandscapeError(FlatnessError):
    """The loss at a point of a landscape could not be computed.

    ``result`` holds the points that were computed before the error, or None if there are none. To compute the other
    points, pass ``result`` as ``resume=`` in another call.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net, batches = torch.nn.Linear(2, 3), [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> try:
        ...     plane = lf.loss_landscape(net, batches, steps=3)
        ... except lf.LandscapeError as error:  # memory ran out at a point: compute the other points one at a time
        ...     plane = lf.loss_landscape(net, batches, steps=3, resume=error.result, chunk=1)
        >>> plane.complete
        True
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


# How torch says that memory is missing: on the CPU of Linux and macOS, on that of Windows, and by a driver of a GPU.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error was raised because a GPU or the CPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in OUT_OF_MEMORY)


def explained(error: Exception) -> FlatnessError | None:
    """Return an error of this package that names a remedy for a known error of autograd; None for other errors."""
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
    if "functorch" in str(error):
        return LayerSelectionError(
            "The forward pass calls a layer inside a transform of torch.func, such as vmap, where it cannot be "
            "observed. Call the layer on the whole batch, outside of the transform."
        )
    return None


def in_one_line(error: Exception) -> str:
    """Return the message of an error. If the error is not of this package, put the name of its type in front."""
    return str(error) if isinstance(error, FlatnessError) else f"{type(error).__name__}: {error}"


@contextmanager
def naming(name: str, kind: str = "Layer") -> Iterator[None]:
    """In a ``with`` block, put ``{kind} '{name}': `` in front of the messages of this package's errors."""
    try:
        yield
    except FlatnessError as error:
        raise type(error)(f"{kind} '{name}': {error}") from error
