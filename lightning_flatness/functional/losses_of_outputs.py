"""Losses whose targets have the shape of the model's output: binary cross-entropy and squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.functional.conditions import holds
from lightning_flatness.functional.curvature import ClassCurvature
from lightning_flatness.functional.losses import Loss, LossDerivatives, outcomes_of


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """The loss ``torch.nn.functional.binary_cross_entropy_with_logits``, averaged over samples and ``K`` binary labels.

    The second derivative with respect to the logits ``f`` is ``Λ = diag(σ(f) σ(-f)) / K``, where ``σ`` is the sigmoid.
    Targets ``(N, K)`` are numbers from 0 to 1.

    Example:
        >>> derivatives = BinaryCrossEntropy()(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        >>> derivatives.residual
        tensor([[-0.2500,  0.2500]], dtype=torch.float64)
    """

    name = "binary_cross_entropy"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at ``logits`` ``(N, K)``."""
        f = logits.double()
        on, off, labels = f.sigmoid(), (-f).sigmoid(), f.shape[1]
        residual = outcomes = None
        if targets is not None:
            y = _like_logits(targets, logits, self.name)
            if not holds(((y >= 0) & (y <= 1)).all()):
                raise BatchError("The targets of binary_cross_entropy must lie between 0 and 1.")
            residual = ((1 - y) * on - y * off) / labels
            losses = nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").mean(1)
            outcomes = outcomes_of(losses, logits, y)
        return LossDerivatives(ClassCurvature(on * off / labels), residual, len(f), float(len(f)), outcomes)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        y = _like_logits(targets, logits, self.name)
        return nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") / logits.shape[1]


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """The loss ``torch.nn.functional.mse_loss``, averaged over samples and ``K`` outputs.

    The second derivative ``Λ`` with respect to the outputs is ``2 / K`` times the identity. Targets have the shape of
    the outputs, ``(N, K)``.

    Example:
        >>> derivatives = MeanSquaredError()(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        >>> derivatives.residual
        tensor([[-1.,  0.]], dtype=torch.float64)
    """

    name = "mse"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at ``logits`` ``(N, K)``."""
        f, outputs = logits.double(), logits.shape[1]
        residual = outcomes = None
        if targets is not None:
            difference = f - _like_logits(targets, logits, self.name)
            residual = 2 * difference / outputs
            outcomes = outcomes_of(difference.square().mean(1), logits, targets)
        curvature = ClassCurvature(torch.full_like(f, 2 / outputs))
        return LossDerivatives(curvature, residual, len(f), float(len(f)), outcomes)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        y = _like_logits(targets, logits, self.name)
        return nn.functional.mse_loss(logits, y, reduction="sum") / logits.shape[1]


def _like_logits(targets: Tensor, logits: Tensor, name: str) -> Tensor:
    if logits.shape[1] == 1 and targets.ndim == 1:
        targets = targets[:, None]
    if targets.shape != logits.shape or targets.is_complex():
        classes = targets.shape == logits.shape[:1] and not targets.is_floating_point()
        remedy = " For class indices, use loss='cross_entropy', or give one_hot vectors." if classes else ""
        raise BatchError(
            f"The targets have shape {tuple(targets.shape)}, but loss='{name}' needs the shape of the model's output, "
            f"{tuple(logits.shape)}.{remedy}"
        )
    return targets.clone().double()
