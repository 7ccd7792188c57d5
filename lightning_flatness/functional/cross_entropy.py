"""Derivatives of the cross-entropy with respect to the logits."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_derivatives(logits: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """First and second derivative of ``-log softmax(f)[y]`` for every sample.

    The second derivative ``Λ = diag(π) - π πᵀ`` is given by ``π`` alone; labels enter only through the first.
    Both are taken in float64: ``π - y`` and ``1 - max π`` cancel for confident samples.

    Args:
        logits: ``f``, shape ``(N, K)``.
        targets: class indices ``(N,)``, or None.

    Returns:
        ``π``, float64 ``(N, K)``; and ``dloss/df = π - y``, float64 ``(N, K)``, or None without targets.

    Example:
        >>> probabilities, residual = cross_entropy_derivatives(torch.zeros(1, 4), torch.tensor([2]))
        >>> residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    if targets is None:
        return probabilities, None
    residual = probabilities.clone()
    # The target's own entry is minus the mass of all others; as a sum it keeps its digits when π_y is nearly one.
    others = probabilities.scatter(1, targets[:, None], 0.0).sum(1, keepdim=True)
    residual.scatter_(1, targets[:, None], -others)
    return probabilities, residual


def cross_entropy_column(probabilities: Tensor, index: int) -> Tensor:
    """One column of a factor ``B`` of the cross-entropy's Hessian, ``B Bᵀ = Λ = diag(π) - π πᵀ``.

    ``diag(√π) - π √πᵀ`` is a factor of ``K`` columns and rank ``K - 1``, as it maps ``√π`` to zero. A reflection
    that takes the last axis to ``√π`` turns its last column to zero, which leaves ``K - 1`` columns to pull back.

    Args:
        probabilities: ``π``, ``(N, K)``.
        index: ``0 .. K - 2``.

    Returns:
        ``(N, K)``.

    Example:
        >>> pi = torch.softmax(torch.randn(1, 4).double(), dim=1)
        >>> B = torch.stack([cross_entropy_column(pi, b)[0] for b in range(3)], dim=1)
        >>> torch.testing.assert_close(B @ B.T, torch.diag(pi[0]) - torch.outer(pi[0], pi[0]))
    """
    roots = probabilities.sqrt()
    share = roots[:, index] / (1 + roots[:, -1])
    # Of the two columns, √π_b (e_b - π), the terms along π and those on the axes are collected.
    column = -(roots[:, index] - share * roots[:, -1])[:, None] * probabilities
    column[:, index] += roots[:, index]
    column[:, -1] -= share * roots[:, -1]
    return column
