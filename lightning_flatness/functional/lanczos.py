"""Largest eigenvalues of many symmetric operators at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.krylov import rounding_error

# Basis vectors that are kept before a restart.
RESTART = 20


class LargestEigenvalues(NamedTuple):
    """The largest Ritz value ``θ`` of every operator, and its distance from an eigenvalue."""

    values: Tensor  # (B,)
    residuals: Tensor  # (B,), ‖H v - θ v‖ of the unit Ritz vector v
    num_products: int  # of all operators with a vector each


def largest_eigenvalues(
    operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_products: int = 100
) -> LargestEigenvalues:
    """Find the largest eigenvalues (by value, not by modulus) of ``B`` symmetric matrices of size ``D``.

    This is the Lanczos method with full re-orthogonalisation. It restarts from the best vector, so that memory does not
    grow. An eigenvalue lies within the residual of each value, and no value is above the largest eigenvalue.

    Args:
        operator: multiplies every matrix with its own vector, ``(B, D) -> (B, D)``.
        start: random vectors, ``(B, D)``.
        tolerance: of the residuals, relative to the values.
        max_products: largest number of calls of ``operator``.

    Source:
        Lanczos 1950; Parlett 1998, "The Symmetric Eigenvalue Problem", Chapter 13.

    Example:
        >>> matrix = torch.diag(torch.arange(8.0).double())
        >>> largest = largest_eigenvalues(lambda v: v @ matrix, torch.randn(1, 8).double())
        >>> abs(largest.values.item() - 7) < 0.01
        True
    """
    vectors = start / start.norm(dim=1, keepdim=True)
    size, done = start.shape[1], 0
    while True:
        basis = [vectors]
        diagonal: list[Tensor] = []
        beyond: list[Tensor] = []
        ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)  # the Krylov space is invariant
        for _ in range(min(RESTART, size, max_products - done)):
            product = operator(basis[-1])
            done += 1
            rayleigh = (product * basis[-1]).sum(1)
            if diagonal:  # vectors after the end are zero; their entries must stay below the largest Ritz value
                rayleigh = torch.where(ended, diagonal[0] - diagonal[0].abs() - 1, rayleigh)
            diagonal.append(rayleigh)
            before = product.norm(dim=1)
            for _ in range(2):  # twice is enough (Parlett 1998, Section 6.9)
                for vector in basis:
                    product = product - (product * vector).sum(1, keepdim=True) * vector
            norm = product.norm(dim=1)
            ended = ended | (norm <= rounding_error(start.dtype) * before)
            beyond.append(torch.where(ended, 0.0, norm))
            values, residuals, ritz = _ritz(diagonal, beyond)
            if bool((residuals <= tolerance * values.abs()).all()):
                return LargestEigenvalues(values, residuals, done)
            basis.append(torch.where(ended, 0.0, 1 / norm)[:, None] * product)
        if done >= max_products or size <= RESTART:
            return LargestEigenvalues(values, residuals, done)
        vectors = torch.einsum("bi,ibd->bd", ritz, torch.stack(basis[:-1]))
        vectors = vectors / vectors.norm(dim=1, keepdim=True)


def _ritz(diagonal: list[Tensor], beyond: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    if len(diagonal) > 1:
        off = torch.diag_embed(torch.stack(beyond[:-1], dim=1), offset=1)
        tridiagonal = tridiagonal + off + off.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[:, -1], (beyond[-1] * vectors[:, -1, -1]).abs(), vectors[:, :, -1]
