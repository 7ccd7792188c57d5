"""Steps that all variants of the Lanczos method share, and a variant for the largest eigenvalues of many matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Number of basis vectors after which :func:`largest_eigenvalues` restarts.
RESTART = 20


def orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Split a vector into its part orthogonal to a basis, and its coefficients in the basis.

    The basis has orthonormal rows, ``(m, D)``. The coefficients are float64 ``(m,)``, on the CPU. The projection onto
    the basis is subtracted twice, because only then is the result orthogonal to working precision (Parlett 1998, "The
    Symmetric Eigenvalue Problem", Section 6.9).
    """
    total = torch.zeros(len(basis), device="cpu").double()
    for _ in range(2):
        coefficients = basis @ vector
        vector = torch.addmv(vector, basis.T, coefficients, alpha=-1)
        total += coefficients.double().cpu()
    return vector, total


def random_orthogonal(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random unit vector ``(D,)`` orthogonal to a basis of orthonormal rows ``(m, D)``; requires ``m < D``."""
    vector: Tensor = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(basis)
    for _ in range(2):  # twice, since the first result may be so short that rounding errors dominate it
        vector, _ = orthogonalised(vector / vector.norm(), basis)
    unit: Tensor = vector / vector.norm()
    return unit


def rounding_error(dtype: torch.dtype) -> float:
    """Return 100 machine epsilons, the tolerance of the test whether a Krylov space is invariant.

    Let ``y`` be the product of the operator with the newest basis vector, and ``r`` the part of ``y`` orthogonal to the
    basis. The space counts as invariant if ``‖r‖`` is at most the tolerance times ``‖y‖``. Some callers take the
    largest norm of a product so far in place of ``‖y‖``.
    """
    return 100 * torch.finfo(dtype).eps


class LargestEigenvalues(NamedTuple):
    """The largest Ritz value ``θ`` of each of ``B`` matrices ``H``, and a bound on its distance from an eigenvalue.

    Attributes:
        values: ``θ``, ``(B,)``.
        residuals: ``‖H v - θ v‖`` of the unit Ritz vector ``v``, ``(B,)``. Some eigenvalue of ``H`` differs from ``θ``
            by at most this number.
        num_products: number of calls of the operator; a call multiplies each matrix with one vector.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 4.0]).double())
        >>> found = largest_eigenvalues(lambda v: v @ matrix, torch.ones(1, 2).double())
        >>> found.values.round(decimals=6), found.num_products
        (tensor([4.], dtype=torch.float64), 2)
    """

    values: Tensor
    residuals: Tensor
    num_products: int

    def converged(self, tolerance: float) -> bool:
        """Return whether every residual is at most ``tolerance`` times the absolute value of its Ritz value."""
        return bool((self.residuals <= tolerance * self.values.abs()).all())


def largest_eigenvalues(
    operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_products: int = 100
) -> LargestEigenvalues:
    """Find the largest eigenvalue (by value, not by modulus) of each of ``B`` symmetric matrices of size ``D``.

    This is the Lanczos method with full re-orthogonalisation. It restarts from the best Ritz vector, so that memory
    does not grow. Each returned value is at most the largest eigenvalue of its matrix. Its distance from some
    eigenvalue of this matrix is at most its residual. See Lanczos 1950, and Parlett 1998, "The Symmetric Eigenvalue
    Problem", Chapter 13.

    Args:
        operator: function that multiplies every matrix with its own vector, ``(B, D) -> (B, D)``.
        start: random vectors, ``(B, D)``.
        tolerance: stop when every residual is at most this number times the absolute value of its Ritz value.
        max_products: largest number of calls of ``operator``.

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
        ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)  # whether the Krylov space is invariant
        for _ in range(min(RESTART, size, max_products - done)):
            product = operator(basis[-1])
            done += 1
            rayleigh = (product * basis[-1]).sum(1)
            if diagonal:
                # If a Krylov space is invariant, its further basis vectors are zero. Their diagonal entries must stay
                # below the largest Ritz value.
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
            found = LargestEigenvalues(values, residuals, done)
            if found.converged(tolerance):
                return found
            basis.append(torch.where(ended, 0.0, 1 / norm)[:, None] * product)
        if done >= max_products or size <= RESTART:
            return found
        vectors = torch.einsum("bi,ibd->bd", ritz, torch.stack(basis[:-1]))
        vectors = vectors / vectors.norm(dim=1, keepdim=True)


def _ritz(diagonal: list[Tensor], beyond: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest Ritz values, their residuals, and the coefficients of their Ritz vectors in the basis."""
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
    if len(diagonal) > 1:
        off = torch.diag_embed(torch.stack(beyond[:-1], dim=1), offset=1)
        tridiagonal = tridiagonal + off + off.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[:, -1], (beyond[-1] * vectors[:, -1, -1]).abs(), vectors[:, :, -1]
