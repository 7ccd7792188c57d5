"""Losses of torch whose mean is over all entries or samples, as functions to the loss of every sample."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeGuard

from torch import Tensor, nn

# Losses whose mean is over all entries of the logits, which are as many for every sample.
OVER_ENTRIES = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.HuberLoss, nn.PoissonNLLLoss, nn.SmoothL1Loss)


def takes_a_mean(loss: Any) -> TypeGuard[nn.Module]:
    """Return whether a loss is a module of torch whose mean :class:`PerSample` can split into samples."""
    return type(loss) in (*OVER_ENTRIES, nn.MultiLabelSoftMarginLoss) and loss.reduction == "mean"


class PerSample(nn.Module):
    """Maps logits ``(N, K)`` and targets to the losses ``(N,)`` of which a loss module of torch takes the mean.

    Targets ``(N,)`` fit one logit. Whole numbers as targets of :data:`OVER_ENTRIES` are converted to floating point.

    Example:
        >>> import torch
        >>> loss, logits = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0])), torch.randn(5, 2)
        >>> losses = PerSample(loss)(logits, torch.ones(5, 2))
        >>> losses.shape, bool((losses.mean() - loss(logits, torch.ones(5, 2))).abs() < 1e-6)
        (torch.Size([5]), True)
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.__name__: Any = type(loss).__name__  # the name in reports
        unreduced: Any = deepcopy(loss)
        unreduced.reduction = "none"
        self.loss = unreduced

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample."""
        if isinstance(self.loss, OVER_ENTRIES):
            targets = targets.to(logits.dtype)
            targets = targets.view_as(logits) if logits.shape[1] == 1 and targets.ndim == 1 else targets
        losses: Tensor = self.loss(logits, targets)
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
