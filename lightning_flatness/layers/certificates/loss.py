"""Certify that a training step's loss has the same Hessian with respect to the logits as mean cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.functional.penalty import target_sums
from lightning_flatness.model.graph import NoSecondDerivative, random_like, second_derivatives


def why_not_cross_entropy(loss: Tensor, logits: Tensor, targets: Tensor | None, scale: float, **options: Any) -> str:
    """Return why ``loss / scale`` is not mean cross-entropy of the logits, or an empty string if it is.

    Terms that are linear in the logits do not matter, because only the second derivative is compared. Along a random
    direction ``v`` this derivative must be ``c (π ∘ v - π <π, v>) / Z``. Here ``π`` is the softmax of the logits, ``c``
    the sum of a sample's weighted targets and ``Z`` the normalizer (``docs/theory.md``, "Losses"). Mixed targets
    (mixup) pass, because they change only the first derivative. ``options`` are those of ``flatness_penalty``. The test
    uses only the part of the autograd graph between logits and loss.
    """
    start = torch.full_like(loss, 1 / scale)
    (first,) = torch.autograd.grad(loss, logits, start, create_graph=True, allow_unused=True)
    if first is None:
        return "the loss does not depend on it"
    direction = random_like(logits)
    seconds = second_derivatives([first], [direction], [logits], retain_graph=True)
    if isinstance(seconds, NoSecondDerivative):
        return f"the loss has no second derivative in torch ({seconds.message})"
    second = torch.zeros_like(logits) if seconds[0] is None else seconds[0]
    f, v = logits.detach().flatten(1), direction.double().flatten(1)
    pi = torch.softmax(f.double(), 1)
    sums, normalizer = target_sums(f, targets, **options)
    expected = pi * (v - (pi * v).sum(1, keepdim=True)) / normalizer
    if sums is not None:
        expected = expected * sums.double()[:, None]
    # For a confident sample, the second derivative is about 1 - π with the largest probability π. In a loss in float32,
    # most digits of 1 - π are lost to rounding.
    lost = 16 * torch.finfo(torch.float32).eps * float(v.abs().max() / normalizer)
    allowed = max(1e-4, 16 * torch.finfo(f.dtype).eps) * float(expected.abs().max()) + lost
    deviation = float((second.double().flatten(1) - expected).abs().max())
    if deviation <= allowed:
        return ""
    return (
        "the loss is not mean cross-entropy of its output: their second derivatives differ by "
        f"{deviation / max(float(expected.abs().max()), lost):.1e} of the largest entry"
    )
