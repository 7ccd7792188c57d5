"""Find the logits in a model's output, check them, and compare the logits of two forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional import Loss
from lightning_flatness.functional.conditions import holds
from lightning_flatness.model.call import as_call, tensors_of
from lightning_flatness.model.graph import ends_with_sigmoid
from lightning_flatness.model.names import plain_name

# Two tensors of logits count as equal if their largest difference is at most this many machine epsilons times the
# largest absolute logit.
ROUNDINGS = 1e3


def logits_of(output: Any) -> Tensor:
    """Return the logits ``(N, K)`` in the output of a model.

    If the output is a tensor, it is the logits. Otherwise the logits are its attribute or entry ``logits``. Raise a
    :class:`BatchError` if there are no logits of this shape, if they are not finite, or if there are no samples.
    """
    logits = any_logits_of(output)
    if not len(logits):
        raise BatchError("A batch has no samples.")
    if not holds(logits.isfinite().all()):
        raise _NotFiniteError(
            f"{NOT_FINITE}: training has diverged, the inputs contain them, or classes are masked with -inf. "
            f"{NO_HESSIAN}"
        )
    return logits


NOT_FINITE = "The logits contain NaN or infinity"
NO_HESSIAN = "The Hessian does not exist for such logits."


class _NotFiniteError(BatchError):
    """Raised if logits are not finite; :func:`finding_what_is_not_finite` adds the cause to the message."""


@contextmanager
def finding_what_is_not_finite(model: nn.Module, inputs: Any, prefix: str = "") -> Iterator[None]:
    """Inside the block, add the cause to every error about logits that are not finite.

    The cause is the first parameter or buffer that is not finite, or the inputs. ``prefix`` is put in front of the
    names of parameters and buffers.
    """
    try:
        yield
    except _NotFiniteError as error:
        raise BatchError(f"{NOT_FINITE}{what_is_not_finite(model, inputs, prefix)} {NO_HESSIAN}") from error


def what_is_not_finite(model: nn.Module, inputs: Any, prefix: str = "") -> str:
    """Return a text that says what is not finite besides the logits, and a remedy.

    The text continues the sentence ``NOT_FINITE``.
    """
    for name, parameter in model.named_parameters(prefix):
        if not bool(parameter.isfinite().all()):
            found = plain_name(name)
            return f", and so does the parameter '{found}': training has diverged. Take an earlier checkpoint."
    for name, buffer in model.named_buffers(prefix):
        if not bool((buffer.isfinite() | (buffer == -torch.inf)).all()):  # -inf may mask positions
            return (
                f", and so does the buffer '{plain_name(name)}': training has diverged, or has seen such inputs. Take "
                "an earlier checkpoint, or compute the buffer again."
            )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(as_call(inputs))):
        return ", and so do the inputs. Clean the data, or leave out the samples that contain them."
    return (
        ", but inputs, parameters and buffers do not: activations overflow, the forward divides by zero, or it masks "
        "classes with -inf."
    )


def any_logits_of(output: Any) -> Tensor:
    """Return the logits like :func:`logits_of`, but accept logits that are not finite or have no samples."""
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"The model returns a {_described(output)}; flatness needs the logits, a tensor of shape "
            f"(samples, classes), or an output with a 'logits' entry. {_remedy(output)}"
        )
    if not logits.is_floating_point():
        raise BatchError(
            f"The logits are numbers of type {logits.dtype}, which have no derivative. Return the floating-point "
            "numbers from before argmax, round or a comparison."
        )
    if logits.ndim != 2:
        hint = " Dense prediction (a class for every pixel or token) is not supported." if logits.ndim > 2 else ""
        if logits.ndim == 1:
            hint = (
                " Return a single logit of every sample as a column, logits.unsqueeze(1), and set "
                "loss='binary_cross_entropy' or 'mse'. Classes, as argmax returns them, have no derivative."
            )
        raise BatchError(f"The logits have shape {tuple(logits.shape)}; they must be (samples, classes).{hint}")
    return logits


def differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of logits differ by more than rounding (``ROUNDINGS``)."""
    return not float((one - other).abs().amax()) <= ROUNDINGS * torch.finfo(one.dtype).eps * float(one.abs().amax())


def certify_deterministic(first: Tensor, second: Tensor) -> None:
    """Raise an error unless the logits of two forward passes on the same samples agree up to rounding."""
    if differ(first, second):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode, so the loss and its "
            "Hessian are not determined. The cause may be dropout without training=self.training, noise in the "
            "forward, or statistics of the batch. Make the forward deterministic in evaluation mode."
        )


def _entries(output: Any) -> dict[Any, Any]:
    """Return the entries of an output by index or key; an empty dictionary unless it is a tuple, list or dictionary."""
    if isinstance(output, dict):
        return output
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def _described(output: Any) -> str:
    shapes = ", ".join(
        f"{key!r}: {tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__}"
        for key, entry in _entries(output).items()
    )
    return f"{type(output).__name__}{f' of {shapes}' if shapes else ''}"


def _remedy(output: Any) -> str:
    tensors = [key for key, entry in _entries(output).items() if isinstance(entry, Tensor) and entry.ndim == 2]
    entry = f"[{tensors[0]!r}]" if tensors else ""
    several = " Measure one output after the other." if len(tensors) > 1 else ""
    return (
        "Wrap the model in a module that returns the logits, with the forward `return "
        f"{f'self.model(*inputs){entry}' if entry else 'logits'}`.{several}"
    )


def question_outputs(logits: Tensor, loss: Loss) -> None:
    """Warn if ``logits``, the output of a model, are probabilities although the loss takes logits.

    The autograd graph shows whether the model ends with a sigmoid. The values do not show this, because logits may lie
    between zero and one, too.
    """
    if loss.name == "cross_entropy" and are_probabilities(logits):
        warnings.warn(
            "The model returns probabilities (rows that sum to one, as after a softmax), but loss='cross_entropy' "
            "takes logits and applies a softmax itself. The measured loss has both softmaxes, so it is not the "
            "training loss if training takes the logarithm of these probabilities. Let the model return the logits, "
            "or their log_softmax.",
            stacklevel=2,
        )
    if loss.name == "binary_cross_entropy" and ends_with_sigmoid(logits):
        warnings.warn(
            "The model returns probabilities (it ends with a sigmoid), but loss='binary_cross_entropy' takes logits "
            "and applies a sigmoid itself, like nn.BCEWithLogitsLoss. The measured loss has both sigmoids. Let the "
            "model return the logits.",
            stacklevel=2,
        )


def are_probabilities(logits: Tensor) -> bool:
    """Return whether the rows of logits ``(N, K)`` could be probabilities of classes, as after a softmax."""
    positive, sums = bool((logits.detach() >= 0).all()), logits.detach().double().sum(1)
    return positive and logits.shape[1] > 1 and bool(((sums - 1).abs() < 1e-3).all())
