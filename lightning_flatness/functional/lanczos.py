"""The Lanczos method: its shared steps, the largest eigenvalues of many operators, eigenpairs of one operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Number of basis vectors after which the method restarts.
RESTART = 20


def orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Split a vector into a part orthogonal to a basis of orthonormal rows ``(m, D)``, and its coefficients in it.

    The coefficients are float64 ``(m,)``, on the CPU. The projection is subtracted twice, which makes the result
    orthogonal to working precision (Parlett 1998, "The Symmetric Eigenvalue Problem", Section 6.9).
    """
    total = torch.zeros(len(basis), device="cpu").double()
    for _ in range(2):
        coefficients = basis @ vector
        vector = torch.addmv(vector, basis.T, coefficients, alpha=-1)
        total += coefficients.double().cpu()
    return vector, total


def random_orthogonal(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random unit vector ``(D,)`` orthogonal to a basis of orthonormal rows ``(m, D)``, ``m < D``."""
    vector: Tensor = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(basis)
    for _ in range(2):  # twice, since the first result may be so short that rounding errors dominate it
        vector, _ = orthogonalised(vector / vector.norm(), basis)
    unit: Tensor = vector / vector.norm()
    return unit


def rounding_error(dtype: torch.dtype) -> float:
    """Return the relative size up to which a remainder is rounding error, which means an invariant Krylov space."""
    return 100 * torch.finfo(dtype).eps


class LargestEigenvalues(NamedTuple):
    """The largest Ritz value ``θ`` of every operator, and a bound on its distance from an eigenvalue."""

    values: Tensor  # (B,)
    residuals: Tensor  # (B,), ‖H v - θ v‖ of the unit Ritz vector v
    num_products: int  # number of calls of the operator, each a product of all matrices with a vector each


def largest_eigenvalues(
    operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-3, max_products: int = 100
) -> LargestEigenvalues:
    """Find the largest eigenvalues (by value, not by modulus) of ``B`` symmetric matrices of size ``D``.

    This is the Lanczos method with full re-orthogonalisation. It restarts from the best vector, so that memory does not
    grow. Each returned value is at most the largest eigenvalue, and differs from some eigenvalue by at most its
    residual. See Lanczos 1950, and Parlett 1998, "The Symmetric Eigenvalue Problem", Chapter 13.

    Args:
        operator: function that multiplies every matrix with its own vector, ``(B, D) -> (B, D)``.
        start: random vectors, ``(B, D)``.
        tolerance: stop when every residual is at most this times its value.
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
            if diagonal:  # in an ended space vectors are zero; their entries must stay below the largest Ritz value
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


class Eigenpairs(NamedTuple):
    """Approximate eigenvalues ``θ`` and eigenvectors ``v`` (Ritz pairs) of an operator ``A``, the largest first."""

    values: Tensor  # float64 (k,)
    vectors: Tensor  # (k, D), orthonormal rows
    residuals: Tensor  # float64 (k,), ‖A v - θ v‖, each from a separate product
    num_products: int  # number of products of A with a vector


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    basis: Tensor,
    top_k: int,
    generator: torch.Generator,
    tolerance: float = 1e-7,
    max_products: int = 1000,
) -> Eigenpairs:
    """Find the ``k`` largest eigenvalues (by value, not by modulus) and eigenvectors by thick-restart Lanczos.

    A Krylov space contains only one vector of every eigenspace. When all ``k`` pairs have converged, the search
    therefore continues from a random vector orthogonal to them, until it finds no larger eigenvalue. In this way
    repeated eigenvalues are found as often as they occur. See Wu and Simon 2000, "Thick-restart Lanczos method for
    large symmetric eigenvalue problems".

    Args:
        product: function that multiplies the operator with a vector, ``(D,) -> (D,)``.
        basis: memory ``(m, D)`` for basis vectors, which is overwritten; ``m`` is at least ``k + 2``, or ``D``.
        top_k: ``k``; at most ``D`` pairs are returned.
        generator: CPU generator that draws the starting vectors.
        tolerance: a pair has converged when its residual is at most this times its eigenvalue.
        max_products: after this many products the current pairs are returned, converged or not. Computing their
            residuals takes ``k`` more products.

    Example:
        >>> matrix = torch.diag(torch.tensor([5.0, 5.0, 1.0, -9.0]).double())
        >>> top_eigenpairs(lambda v: matrix @ v, torch.empty(4, 4).double(), 2, torch.Generator()).values
        tensor([5.0000, 5.0000], dtype=torch.float64)
    """
    length = basis.shape[1]
    top_k = min(top_k, length)
    search = _Search(product, basis, generator)
    settled: Tensor | None = None
    while True:
        search.step()
        values, residuals = search.values, search.residuals
        if search.size == length:
            break
        accuracy = tolerance * values.abs() + search.rounding
        if search.size >= top_k and bool((residuals <= accuracy)[:top_k].all()):
            new = settled is None or bool((values[:top_k] > settled + accuracy[:top_k]).any())
            if not new and search.size > top_k and _is_below(values, residuals, accuracy, top_k, length):
                break
            if new:
                settled = values[:top_k].clone()
                search.keep(top_k)
                search.following = random_orthogonal(basis[:top_k], generator)
        if search.num_products >= max_products and search.size >= top_k:
            break
        if search.size == len(basis):
            search.keep(top_k + (len(basis) - top_k) // 2)
    search.keep(top_k)
    vectors = basis[:top_k].clone()
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    vectors *= torch.where(signs == 0, 1.0, signs)
    values = search.values[:top_k]
    residuals = torch.stack([(product(v) - float(t) * v).norm() for v, t in zip(vectors, values, strict=True)])
    return Eigenpairs(values, vectors, residuals.double().cpu(), search.num_products + top_k)


def _is_below(values: Tensor, residuals: Tensor, accuracy: Tensor, top_k: int, length: int) -> bool:
    """Return whether Ritz pair ``k + 1`` has converged enough to exclude another eigenvalue equal to the ``k``-th."""
    # If the vector of pair k + 1 had a part c in the eigenspace of the k-th value, its residual would be at least c
    # times the gap. A random vector starts with c of about 1/√D, and c grows during the search.
    gap = float(values[top_k - 1] - values[top_k])
    return float(residuals[top_k]) <= max(0.1 * gap / math.sqrt(length), float(accuracy[top_k]))


class _Search:
    """An orthonormal basis that grows by Lanczos steps, and the operator projected onto it."""

    def __init__(self, product: Callable[[Tensor], Tensor], basis: Tensor, generator: torch.Generator) -> None:
        self._product, self._basis, self._generator = product, basis, generator
        self._projected = torch.zeros(len(basis), len(basis), device="cpu").double()
        self._coefficients = torch.zeros(0, 0, device="cpu").double()  # columns: Ritz vectors in the basis
        self._scale = 0.0
        self.size = self.num_products = 0
        self.values = self.residuals = torch.zeros(0, device="cpu").double()
        self.following: Tensor | None = random_orthogonal(basis[:0], generator)

    @property
    def rounding(self) -> float:
        """Size below which residuals are rounding errors."""
        return rounding_error(self._basis.dtype) * self._scale

    def step(self) -> None:
        """Add one vector to the basis and update the Ritz values, in descending order."""
        assert self.following is not None
        self._basis[self.size] = self.following
        image = self._product(self._basis[self.size])
        self.num_products += 1
        self.size += 1
        self._scale = max(self._scale, float(image.norm()))
        basis = self._basis[: self.size]
        image, column = orthogonalised(image, basis)
        self._projected[: self.size, self.size - 1] = self._projected[self.size - 1, : self.size] = column
        norm = float(image.norm())
        if norm <= self.rounding:
            norm = 0.0
            self.following = None if self.size == basis.shape[1] else random_orthogonal(basis, self._generator)
        else:
            self.following = image / norm
        values, vectors = torch.linalg.eigh(self._projected[: self.size, : self.size])
        self.values, self._coefficients = values.flip(0), vectors.flip(1)
        self.residuals = norm * self._coefficients[-1].abs()

    def keep(self, number: int) -> None:
        """Replace the basis by the ``number`` best Ritz vectors."""
        mix = self._coefficients[:, :number].T.to(self._basis)
        for columns in self._basis[: self.size].split(2**16, dim=1):  # in parts, to save memory
            columns[:number] = mix @ columns
        self.size = number
        self.values, self.residuals = self.values[:number], self.residuals[:number]
        self._coefficients = torch.eye(number, device="cpu").double()
        self._projected.zero_()
        self._projected[:number, :number] = torch.diag(self.values)
