"""Simple numbers from a forward pass, for comparison with measures of flatness."""

from __future__ import annotations

import torch
from torch import Tensor


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the logit of each sample's target class minus the largest other logit, float64 ``(N,)``.

    ``targets`` are class indices, ``(N,)``.

    Example:
        >>> margins(torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]]), torch.tensor([1, 2]))
        tensor([ 2., -2.], dtype=torch.float64)
    """
    logits, targets = logits.double(), targets[:, None]
    others = logits.scatter(1, targets, -torch.inf).amax(1)
    return logits.gather(1, targets)[:, 0] - others


def feature_spreads(features: Tensor, weight: Tensor) -> Tensor:
    """Compute ``‖g‖² mean_k ‖w_k - w̄‖²`` for every sample, float64 ``(N,)``.

    ``g`` is the classifier's input, a row of ``features`` ``(N, m)``. ``w_k`` are the rows of the classifier's
    ``weight`` ``(K, m)``, and ``w̄`` is their mean. Further dimensions of ``features`` and ``weight`` must have size
    one. If the network gave all classes the same probability, this number would be the sample's relative flatness under
    cross-entropy.

    Example:
        >>> feature_spreads(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor([5.], dtype=torch.float64)
    """
    features, weight = features.flatten(1).double(), weight.flatten(1).double()
    return features.square().sum(1) * (weight - weight.mean(0)).square().sum(1).mean()
