"""The largest eigenvalues of one symmetric operator and their eigenvectors, by the thick-restart Lanczos method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.lanczos import orthogonalised, random_orthogonal, rounding_error

# A search for missed eigenvectors starts from a random unit vector. The search ends when the component of this vector
# along any missed eigenvector would be at most IMPROBABLE_PART / √D. Such a small component has a probability below
# 1e-4.
IMPROBABLE_PART = 1e-4


class Eigenpairs(NamedTuple):
    """Approximate eigenvalues ``θ`` and eigenvectors ``v`` (Ritz pairs) of an operator ``A``, the largest first.

    Attributes:
        values: ``θ``, descending, float64 ``(k,)``.
        vectors: ``v``, orthonormal rows, ``(k, D)``.
        residuals: ``‖A v - θ v‖``, float64 ``(k,)``, computed with one more product for every pair.
        num_products: number of products of ``A`` with a vector.
        asymmetry: largest ``|q_iᵀA q_j - q_jᵀA q_i|`` for basis vectors ``q``, divided by the largest ``‖A q_i‖``.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 4.0, 2.0]).double())
        >>> found = top_eigenpairs(lambda v: matrix @ v, torch.empty(3, 3).double(), 2, torch.Generator())
        >>> found.values.round(decimals=6), found.vectors.shape
        (tensor([4., 2.], dtype=torch.float64), torch.Size([2, 3]))
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_products: int
    asymmetry: float = 0.0


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    basis: Tensor,
    top_k: int,
    generator: torch.Generator,
    tolerance: float = 1e-7,
    max_products: int = 1000,
) -> Eigenpairs:
    """Find the ``k`` largest eigenvalues (by value, not by modulus) and eigenvectors by thick-restart Lanczos.

    A Krylov space contains only one vector of every eigenspace, so it misses copies of repeated eigenvalues. Therefore,
    when ``k`` pairs have converged, a second search begins with a random vector orthogonal to all converged
    eigenvectors. This search looks for a missed eigenvalue larger than the ``k``-th. It ends when the probability that
    there is such an eigenvalue is negligible. So a repeated eigenvalue is found as often as it occurs. See Wu and Simon
    2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".

    Args:
        product: function that multiplies the operator with a vector, ``(D,) -> (D,)``.
        basis: memory ``(m, D)`` for basis vectors, which is overwritten. ``m`` must be ``D`` or at least ``k + 2``.
        top_k: ``k``; at most ``D`` pairs are returned.
        generator: CPU generator that draws the starting vectors.
        tolerance: a pair has converged when its residual, up to rounding, is at most this number times the absolute
            value of its eigenvalue.
        max_products: after this many products the current pairs are returned, converged or not. Computing their
            residuals takes ``k`` more products.

    Example:
        >>> matrix = torch.diag(torch.tensor([5.0, 5.0, 1.0, -9.0]).double())
        >>> top_eigenpairs(lambda v: matrix @ v, torch.empty(4, 4).double(), 2, torch.Generator()).values
        tensor([5.0000, 5.0000], dtype=torch.float64)
    """
    rows, length = basis.shape
    top_k = min(top_k, length)
    search = _Search(product, basis, random_orthogonal(basis[:0], generator), generator)
    others = 0  # number of products in the searches for missed eigenvalues
    while True:
        search.step()
        if search.size == length:
            break
        left = max_products - search.num_products - others
        if left <= 0 and search.size >= top_k:
            break
        accuracy = tolerance * search.values.abs() + search.rounding
        if search.size >= top_k and bool((search.residuals <= accuracy)[:top_k].all()):
            lowest, enough = float(search.values[top_k - 1]), float(accuracy[top_k - 1])
            # Also keep further converged pairs, because they shorten the search for missed eigenvalues. Leave two rows
            # for that search.
            errors = search.residuals.square() / (lowest + enough - search.values)
            settled = int((errors <= enough)[top_k : max(rows - 2, top_k)].cumprod(0).sum())
            search.keep(top_k + settled)
            known, rest = basis[: search.size], basis[search.size :]
            missed, products = _missed(product, known, rest, lowest, enough, generator, left)
            others += products
            if missed is None:
                break
            search.keep(top_k)
            search.follow(missed)
        elif search.size == rows:
            search.keep(top_k + (rows - top_k) // 2)
    search.keep(top_k)
    vectors = basis[:top_k].clone()
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    vectors *= torch.where(signs == 0, 1.0, signs)
    values = search.values[:top_k]
    residuals = torch.stack([(product(v) - float(t) * v).norm() for v, t in zip(vectors, values, strict=True)])
    num_products = search.num_products + others + top_k
    return Eigenpairs(values, vectors, residuals.double().cpu(), num_products, search.asymmetry)


def _missed(
    product: Callable[[Tensor], Tensor],
    known: Tensor,
    basis: Tensor,
    lowest: float,
    accuracy: float,
    generator: torch.Generator,
    max_products: int,
) -> tuple[Tensor | None, int]:
    """Search for a missed eigenvalue above ``lowest``, the ``k``-th largest eigenvalue found so far.

    The search takes place in the orthogonal complement of the rows of ``known``, which are the orthonormal eigenvectors
    found so far. Further eigenvectors of a repeated eigenvalue lie in this complement.

    Return a vector ``(D,)`` whose Rayleigh quotient exceeds ``lowest + accuracy``, and the number of products. If no
    such vector is found within ``max_products`` products, return None in place of the vector. ``basis`` is memory for
    basis vectors. It has at least two rows, or one row if the complement has one dimension.
    """

    def complement(vector: Tensor) -> Tensor:
        return orthogonalised(product(vector), known)[0]

    level = lowest + accuracy
    search = _Search(complement, basis, random_orthogonal(known, generator), generator, level)
    while search.num_products < max_products:
        search.step()
        if search.values[0] > level:
            search.keep(1)
            return basis[0].clone(), search.num_products
        is_excluded = search.part_above <= IMPROBABLE_PART / math.sqrt(known.shape[1])
        if is_excluded or search.residuals[0] <= accuracy:
            break
        if search.size == len(basis):
            search.keep(len(basis) // 2)
    return None, search.num_products


class _Search:
    """A Lanczos iteration: an orthonormal basis that grows step by step, and the operator projected onto the basis.

    Every step adds the vector ``following`` to the basis. ``values`` are the Ritz values, the largest first, and
    ``residuals`` the residuals of the Ritz pairs. ``level`` is the eigenvalue that :attr:`part_above` refers to.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        basis: Tensor,
        start: Tensor,
        generator: torch.Generator,
        level: float = math.inf,
    ) -> None:
        self._product, self._basis, self._generator = product, basis, generator
        self._projected = torch.zeros(len(basis), len(basis), device="cpu").double()
        self._coefficients = torch.zeros(0, 0, device="cpu").double()  # columns: Ritz vectors in the basis
        # Coefficients of the starting vector along the basis and the following vector. After a restart, these
        # coefficients give the right inner product of the starting vector with an eigenvector only if the eigenvalue of
        # the eigenvector is `level`.
        self._level, self._first = level, torch.eye(1, len(basis) + 1, dtype=torch.float64, device="cpu")[0]
        # The largest norm of a product so far, and the norm of the part of the latest product outside the basis.
        self._scale = self._beyond = 0.0
        self._coupling: Tensor | None = None  # the next product's coefficients if the operator is symmetric
        self.size = self.num_products = 0
        self.asymmetry = 0.0
        self.values = self.residuals = torch.zeros(0, device="cpu").double()
        self.following: Tensor | None = start

    @property
    def rounding(self) -> float:
        """The largest residual that counts as a rounding error."""
        return rounding_error(self._basis.dtype) * self._scale

    def step(self) -> None:
        """Add ``following`` to the basis, multiply the operator with it, and update the Ritz values and residuals."""
        assert self.following is not None
        self._basis[self.size] = self.following
        image = self._product(self._basis[self.size])
        self.num_products += 1
        self.size += 1
        self._scale = max(self._scale, float(image.norm()))
        basis = self._basis[: self.size]
        image, column = orthogonalised(image, basis)
        if self._coupling is not None and self._scale:
            error = float((column[:-1] - self._coupling).abs().max())
            self.asymmetry = max(self.asymmetry, error / self._scale)
        self._projected[: self.size, self.size - 1] = self._projected[self.size - 1, : self.size] = column
        norm = float(image.norm())
        if norm <= self.rounding:
            norm = 0.0
            self.following = None if self.size == basis.shape[1] else random_orthogonal(basis, self._generator)
        else:
            self.following = image / norm
        values, vectors = torch.linalg.eigh(self._projected[: self.size, : self.size])
        self.values, self._coefficients = values.flip(0), vectors.flip(1)
        self._beyond = norm
        self.residuals = norm * self._coefficients[-1].abs()
        self._coupling = torch.zeros(self.size, device="cpu").double()
        self._coupling[-1] = norm

    @property
    def part_above(self) -> float:
        """A bound on the starting vector's component along an eigenvector whose eigenvalue is at least ``level``.

        Requires: all Ritz values are below ``level``. Let ``A`` be the operator, ``V`` the basis, ``T`` the projected
        operator, ``q`` the vector ``following`` and ``e`` the last unit vector. ``A V = V T + β q eᵀ`` holds for a
        number ``β``. So for an eigenvector with the eigenvalue ``level``, the components along the basis are
        ``β (level - T)⁻¹ e`` times the component along ``q``. The eigenvector has norm one, which bounds the component
        along ``q``, and so the component along the starting vector.
        """
        parts = self._parts()
        first = self._first[: self.size] @ self._coefficients
        return float((first @ parts).abs() / (1 + parts @ parts).sqrt())

    def _parts(self) -> Tensor:
        """Return what an eigenvector with the eigenvalue ``level`` would have as components along the Ritz vectors.

        They are divided by its component along ``following``.
        """
        return self._beyond * self._coefficients[-1] / (self._level - self.values)

    def keep(self, number: int) -> None:
        """Replace the basis by the ``number`` Ritz vectors with the largest Ritz values."""
        mix = self._coefficients[:, :number].T.to(self._basis)
        for columns in self._basis[: self.size].split(2**16, dim=1):  # in parts, to save memory
            columns[:number] = mix @ columns
        first = self._first[: self.size] @ self._coefficients
        in_following = (first * self._parts())[number:].sum()
        self._first.zero_()
        self._first[:number], self._first[number] = first[:number], in_following
        self.size = number
        self.values, self.residuals = self.values[:number], self.residuals[:number]
        self._coupling = self._beyond * self._coefficients[-1, :number]
        self._coefficients = torch.eye(number, device="cpu").double()
        self._projected.zero_()
        self._projected[:number, :number] = torch.diag(self.values)

    def follow(self, vector: Tensor) -> None:
        """Let the next step add ``vector``, which is orthogonal to the basis and was found by another search."""
        self.following, self._coupling = vector, None
