"""Find the logits in a model's output, and compare those of two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional.conditions import holds

# The largest relative difference between logits that are the same but for rounding, in units of the machine epsilon.
ROUNDINGS = 1e3


def logits_of(output: Any) -> Tensor:
    """Return the finite logits ``(N, K)``: the output itself if it is a tensor, or its ``logits`` attribute or key."""
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
    """Return the logits like :func:`logits_of`, but also if they are not finite or there are no samples."""
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"The model returns a {type(output).__name__}; flatness needs the logits, a tensor of shape "
            "(samples, classes), or an output with a 'logits' entry. Wrap the model so that it returns them."
        )
    if logits.ndim != 2:
        hint = " Dense prediction (a class for every pixel or token) is not supported." if logits.ndim > 2 else ""
        raise BatchError(f"The logits have shape {tuple(logits.shape)}; they must be (samples, classes).{hint}")
    return logits


def differ(one: Tensor, other: Tensor) -> bool:
    """Return whether logits differ by more than rounding."""
    return not float((one - other).abs().amax()) <= ROUNDINGS * torch.finfo(one.dtype).eps * float(one.abs().amax())


def certify_deterministic(first: Tensor, second: Tensor) -> None:
    """Certify that two forward passes on the same samples give the same logits."""
    if differ(first, second):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward? statistics of the batch?), so there is no one loss to take "
            "the Hessian of."
        )
