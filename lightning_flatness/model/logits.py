"""Find the logits in a model's output, check them, and compare the logits of two forward passes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional import Loss
from lightning_flatness.functional.conditions import holds
from lightning_flatness.model.graph import ends_with_sigmoid

# Logits that differ by at most this count as equal up to rounding; relative, in units of the machine epsilon.
ROUNDINGS = 1e3


def logits_of(output: Any) -> Tensor:
    """Return the logits ``(N, K)``: the output if it is a tensor, else its ``logits`` attribute or key.

    Raise a :class:`BatchError` if the logits are not finite, have another shape or no samples.
    """
    logits = any_logits_of(output)
    if not len(logits):
        raise BatchError("A batch has no samples.")
    if not holds(logits.isfinite().all()):
        raise BatchError(
            "The logits contain NaN or infinity: training has diverged, the inputs contain them, or classes are masked "
            "with -inf. The Hessian does not exist for such logits."
        )
    return logits


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
    if logits.ndim != 2:
        hint = " Dense prediction (a class for every pixel or token) is not supported." if logits.ndim > 2 else ""
        raise BatchError(f"The logits have shape {tuple(logits.shape)}; they must be (samples, classes).{hint}")
    return logits


def differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of logits differ by more than rounding."""
    return not float((one - other).abs().amax()) <= ROUNDINGS * torch.finfo(one.dtype).eps * float(one.abs().amax())


def certify_deterministic(first: Tensor, second: Tensor) -> None:
    """Raise an error unless the logits of two forward passes on the same samples agree up to rounding."""
    if differ(first, second):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward? statistics of the batch?), so the loss, and with it the "
            "Hessian, is not determined."
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
        "Wrap the model so that it returns them: a module whose forward is `return "
        f"{f'self.model(*inputs){entry}' if entry else 'logits'}`.{several}"
    )


def question_outputs(logits: Tensor, loss: Loss) -> None:
    """Warn if a model returns probabilities although the loss takes logits.

    A sigmoid at the end of the model is looked up in the autograd graph, because logits may lie between zero and one,
    too.
    """
    if loss.name == "cross_entropy" and are_probabilities(logits):
        warnings.warn(
            "The model returns probabilities (rows that sum to one, as after a softmax), but loss='cross_entropy' "
            "takes logits and applies a softmax itself. The measured loss has both softmaxes, so it is not the "
            "loss of a training on the logarithm of these probabilities. Let the model return the logits, or their "
            "log_softmax.",
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
