"""Find the logits in a model's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional.conditions import holds


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
