"""Largest eigenvalues of symmetric operators, many at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LargestEigenvalues(NamedTuple):
    """Ritz values and how far from eigenvalues they are, one for every operator."""

    values: Tensor  # (B,)
    residuals: Tensor  # (B,): ‖H v - θ v‖ for the unit Ritz vector v
    num_products: int  # of the operators with vectors


def largest_eigenvalues(
    operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_products: int = 100
) -> LargestEigenvalues:
    """Largest (not: largest in modulus) eigenvalues of ``B`` symmetric matrices of size ``D``, by the Lanczos method.

    With full re-orthogonalisation, and restarted from the best vector, so that memory does not grow. A residual
    ``r`` says that there is an eigenvalue within ``r`` of the value; the value is never above the largest.
    Source: Lanczos 1950; Parlett 1998, "The Symmetric Eigenvalue Problem", chapter 13.

    Args:
        operator: multiplies every matrix with its vector, ``(B, D) -> (B, D)``.
        start: random vectors, ``(B, D)``.
        tolerance: of the residual, relative to the value.
        max_products: products of the operator with vectors.

    Example:
        >>> matrix = torch.diag(torch.arange(8.0).double())
        >>> found = largest_eigenvalues(lambda v: v @ matrix, torch.randn(1, 8).double())
        >>> abs(found.values.item() - 7) < 0.01
        True
    """
    vectors = start / start.norm(dim=1, keepdim=True)
    size, done = start.shape[1], 0
    while True:
        basis = [vectors]
        diagonal: list[Tensor] = []
        beyond: list[Tensor] = []
        ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)  # in an invariant subspace
        for _ in range(min(RESTART, size, max_products - done)):
            product = operator(basis[-1])
            done += 1
            rayleigh = (product * basis[-1]).sum(1)
            if diagonal:  # what comes after the end must not look like a large eigenvalue
                rayleigh = torch.where(ended, diagonal[0] - diagonal[0].abs() - 1, rayleigh)
            diagonal.append(rayleigh)
            before = product.norm(dim=1)
            for _ in range(2):  # twice is enough (Parlett)
                for vector in basis:
                    product = product - (product * vector).sum(1, keepdim=True) * vector
            norm = product.norm(dim=1)
            ended = ended | (norm <= 100 * torch.finfo(start.dtype).eps * before)
            beyond.append(torch.where(ended, 0.0, norm))
            values, residuals, ritz = _ritz(diagonal, beyond)
            if bool((residuals <= tolerance * values.abs()).all()):
                return LargestEigenvalues(values, residuals, done)
            basis.append(torch.where(ended, 0.0, 1 / norm)[:, None] * product)
        if done >= max_products or size <= RESTART:
            return LargestEigenvalues(values, residuals, done)
        vectors = torch.einsum("bi,ibd->bd", ritz, torch.stack(basis[:-1]))
        vectors = vectors / vectors.norm(dim=1, keepdim=True)


# Vectors that are kept before a restart.
RESTART = 20


def _ritz(diagonal: list[Tensor], beyond: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    if len(diagonal) > 1:
        off = torch.diag_embed(torch.stack(beyond[:-1], dim=1), offset=1)
        tridiagonal = tridiagonal + off + off.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[:, -1], (beyond[-1] * vectors[:, -1, -1]).abs(), vectors[:, :, -1]
