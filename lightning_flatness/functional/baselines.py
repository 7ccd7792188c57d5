"""Numbers that come with a forward pass, to compare measures of flatness with."""

from __future__ import annotations

import torch
from torch import Tensor


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logit of each target minus the largest other one, ``(N,)``, float64; targets are class indices.

    Example:
        >>> margins(torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]]), torch.tensor([1, 2]))
        tensor([ 2., -2.], dtype=torch.float64)
    """
    logits, targets = logits.double(), targets[:, None]
    others = logits.scatter(1, targets, -torch.inf).amax(1)
    return logits.gather(1, targets)[:, 0] - others


def feature_spreads(features: Tensor, weight: Tensor) -> Tensor:
    """Return ``‖g‖² mean_k ‖w_k - w̄‖²`` of each sample, ``(N,)``, float64, of a classifier's input and weight.

    It is the relative flatness of the classifier if all its classes were equally probable. ``features`` are ``(N, m)``
    and ``weight`` ``(K, m)``; further dimensions must have size one.

    Example:
        >>> feature_spreads(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor([5.], dtype=torch.float64)
    """
    features, weight = features.flatten(1).double(), weight.flatten(1).double()
    return features.square().sum(1) * (weight - weight.mean(0)).square().sum(1).mean()
