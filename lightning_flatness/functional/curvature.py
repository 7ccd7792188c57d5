"""The curvature of a loss: for every sample ``n``, the Hessian ``Λ_n`` of the loss with respect to the logits.

The closed form and the Gauss-Newton method do not use the matrix ``Λ`` itself. The closed form needs factors of
``VᵀΛV`` for a matrix ``V`` ``(K, S)``. The Gauss-Newton method needs the columns of a matrix ``B`` with
``B diag(signs) Bᵀ = Λ``, one at a time. Signs of -1 are needed only if ``Λ`` may have negative eigenvalues.
:class:`ClassCurvature`, :class:`DenseCurvature` and :class:`AutogradCurvature` (``autograd_curvature.py``) provide
factors and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# With fewer classes than this, the Gauss-Newton method uses every class, and does not estimate the sum over classes by
# random probes. :attr:`ClassCurvature.floor` is then None.
MANY_CLASSES = 128
# Classes are left out only if less than this share of all pairs (sample, class) remains. Otherwise it is faster to
# compute all pairs.
WORTHWHILE = 0.9
# Largest number of entries of an intermediate result.
ELEMENTS = 2**22


class Projection(NamedTuple):
    """Factors of ``VᵀΛV = columnsᵀ diag(signs) columns + floor · VᵀV + diag(rest)`` for every sample.

    If ``others`` are given, ``VᵀΛV`` is only ``columnsᵀ others``, without signs, floor and rest. If ``rest`` is given,
    only the diagonal of the sum is exact.
    """

    columns: Tensor  # (N, C, S), where C is the number of columns
    counts: list[int]  # for every sample, how many of its columns are used; later columns are zero
    signs: Tensor | None = None  # (N, C); None if all are +1
    floor: Tensor | None = None  # (N,), the smallest class weight of every sample; None if the sum lacks this term
    rest: Tensor | None = None  # (N, S), the diagonal of the terms of the classes that were left out
    others: Tensor | None = None  # (N, C, S)


@dataclass(frozen=True)
class ClassCurvature:
    """A curvature that is a sum over classes, ``Λ_n = Σ_k w_{nk} (e_k - π_n)(e_k - π_n)ᵀ``.

    ``e_k`` is the unit vector of class ``k``. For cross-entropy, ``π`` is the softmax of the logits, and ``w = c π``,
    where ``c`` is the sum of the target's entries. Then ``Λ = c (diag(π) - π πᵀ)``. Without ``center``, ``Λ`` is
    ``diag(w)``, as for the squared error.

    Args:
        weights: ``w``, float64 ``(N, K)``, not negative. With a ``center``, ``w_n`` must be a multiple of ``π_n``.
        center: ``π``, ``(N, K)``, whose rows sum to one. None means that zero takes the place of ``π``.

    Example:
        >>> pi = torch.softmax(torch.randn(1, 4).double(), dim=1)
        >>> curvature = ClassCurvature(pi, pi)
        >>> B = torch.stack([curvature.column(b)[0] for b in range(curvature.num_columns)], dim=1)
        >>> torch.testing.assert_close(B @ B.T, torch.diag(pi[0]) - torch.outer(pi[0], pi[0]))
    """

    weights: Tensor
    center: Tensor | None = None

    signs = None

    def __getitem__(self, samples: slice) -> ClassCurvature:
        return ClassCurvature(self.weights[samples], None if self.center is None else self.center[samples])

    def scaled(self, factor: float) -> ClassCurvature:
        """Return the curvature of the loss times a positive factor."""
        return ClassCurvature(factor * self.weights, self.center)

    @property
    def num_classes(self) -> int:
        """``K``, the number of classes."""
        return self.weights.shape[1]

    @property
    def num_columns(self) -> int:
        """The number of columns that :meth:`column` can return: ``K - 1`` with a center, else ``K``."""
        return self.num_classes - (self.center is not None)

    def factor(self, x: Tensor) -> Tensor:
        """Compute ``B x``, where ``B`` has the ``K`` columns ``√w_k (e_k - π)``; ``x`` and ``B x`` are ``(N, K)``."""
        y = self.weights.sqrt() * x
        return y if self.center is None else y - self.center * y.sum(1, keepdim=True)

    def column(self, index: int) -> Tensor:
        """Return one column, ``(N, K)``, of a matrix ``B`` with ``B Bᵀ = Λ`` and :attr:`num_columns` columns.

        With a center, the matrix of :meth:`factor` maps ``√π`` to zero. ``B`` is the product of that matrix and the
        reflection that maps the last unit vector to ``-√π``. The last column of the product is zero and is left out.
        """
        x = torch.zeros_like(self.weights)
        x[:, index] = 1
        if self.center is not None:
            roots = self.center.sqrt()
            x[:, -1] = -roots[:, index] / (1 + roots[:, -1])
        return self.factor(x)

    def centred(self, matrix: Tensor) -> Tensor:
        """Subtract the mean row of ``V = matrix`` from all rows if there is a center; ``VᵀΛV`` does not change."""
        return matrix if self.center is None else matrix - matrix.mean(0)

    @property
    def floor(self) -> Tensor | None:
        """The smallest class weight of each sample, ``(N,)``; None if these are negligible or ``K < MANY_CLASSES``."""
        floor, classes = self.weights.amin(1), self.num_classes
        worthwhile = classes >= MANY_CLASSES and bool(classes * floor.sum() > 0.01 * self.weights.sum())
        return floor if worthwhile else None

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        """Factor ``VᵀΛV``, where ``V = matrix`` comes from :meth:`centred`; with a tolerance, leave out some classes.

        The columns are ``√w_k (v_k - πᵀV)``, where ``v_k`` is row ``k`` of ``V``. This avoids the cancellation in
        ``diag(π) - π πᵀ``.

        With a tolerance, classes that add little to ``t = Σ_{n,s} scales[n, s] (VᵀΛ_nV)[s, s]`` are left out if that
        saves enough work. Their terms in ``t`` sum to at most ``tolerance * t``; ``scales`` ``(N, S)`` must not be
        negative. The diagonal of what is left out is returned as ``rest``, so only entries off the diagonal are
        approximate. If classes are left out, :attr:`floor` is returned as well. If ``floor`` is not None, the columns
        have the weights ``w_k - floor`` in place of ``w_k``. With a ``floor`` and a center, there is one more column,
        ``√(K floor) πᵀV``.
        """
        weights, (samples, classes) = self.weights, self.weights.shape
        mean = None if self.center is None else self.center.to(matrix.dtype) @ matrix  # m, (N, S)
        counts, chosen, floor, rest = [classes] * samples, None, None, None
        if tolerance > 0 and scales is not None:
            floor = self.floor
            above = weights if floor is None else weights - floor[:, None]
            kept = _kept(above, matrix, mean, scales, floor, tolerance)
            counts = kept.sum(1).tolist()
            if sum(counts) < WORTHWHILE * samples * classes:
                rest = _sum_over_dropped(above * ~kept, matrix, mean)
                chosen = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : max(counts)]
                weights = (above * kept).gather(1, chosen)
            else:
                counts, floor = [classes] * samples, None
        shared = int(mean is not None and floor is not None)  # one more column, for K floor m mᵀ
        columns = matrix.new_empty(samples, shared + weights.shape[1], matrix.shape[1])
        of_classes = columns[:, shared:]
        # In place, to save memory: with a thousand classes, the columns of one sample take some ten megabytes.
        if chosen is not None:
            for rows, indices in zip(of_classes, chosen, strict=True):
                torch.index_select(matrix, 0, indices, out=rows)
        else:
            of_classes.copy_(matrix)
        if mean is not None:
            of_classes -= mean[:, None]
        of_classes *= weights.sqrt().to(matrix.dtype)[:, :, None]
        if shared and mean is not None and floor is not None:  # Σ_k (v_k - m)(v_k - m)ᵀ = VᵀV + K m mᵀ, V centred
            columns[:, 0] = (classes * floor).sqrt().to(matrix.dtype)[:, None] * mean
        return Projection(columns, [count + shared for count in counts], floor=floor, rest=rest)

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Compute the diagonal of ``VᵀΛV`` for every sample, float64 ``(N, S)``; ``V`` is ``matrix``."""
        return _sum_of_squares(self.weights, matrix, None if self.center is None else self.center.to(matrix) @ matrix)

    def summed(self, scales: Tensor) -> Tensor:
        """Compute ``Σ_n scales[n] Λ_n``, float64 ``(K, K)``."""
        scaled = self.weights * scales[:, None]
        if self.center is None:
            return scaled.sum(0).diag()
        # Rows of Λ sum to zero, so a diagonal entry is minus the sum of the other entries in its row. This is accurate
        # even if π is almost one-hot.
        total = -(scaled.T @ self.center).fill_diagonal_(0)
        return total - total.sum(1).diag()

    def diagonals(self) -> Tensor:
        """Compute the diagonal of ``Λ`` for every sample, float64 ``(N, K)``."""
        if self.center is None:
            return self.weights
        # For the largest entry of π, which may be close to one, 1 - π is the sum of the other entries.
        _, top = self.center.max(1, keepdim=True)
        others = self.center.scatter(1, top, 0.0).sum(1, keepdim=True)
        return self.weights * (1 - self.center).scatter(1, top, others)

    def traces(self) -> Tensor:
        """Compute the trace of ``Λ`` of every sample, float64 ``(N,)``."""
        return self.diagonals().sum(1)

    def apply(self, x: Tensor) -> Tensor:
        """Compute ``Λ x``; ``x`` and the result are float64 ``(N, K)``."""
        if self.center is None:
            return self.weights * x
        y = self.weights * (x - (self.center * x).sum(1, keepdim=True))
        return y - self.center * y.sum(1, keepdim=True)


@dataclass(frozen=True)
class DenseCurvature:
    """Any symmetric curvature, stored as ``Λ_n = B_n diag(signs_n) B_nᵀ``; its eigenvalues may be negative.

    Args:
        roots: ``B``, float64 ``(N, K, C)``, with ``C`` columns.
        signs: signs of the columns of ``B``, ``(N, C)``.

    Example:
        >>> curvature = DenseCurvature.of(torch.tensor([[[2.0, 0.0], [0.0, -3.0]]]))
        >>> curvature.signs
        tensor([[-1.,  1.]])
    """

    roots: Tensor
    signs: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> DenseCurvature:
        """Factor symmetric matrices ``Λ_n``, float64 ``(N, K, K)``, by their eigendecompositions."""
        values, vectors = torch.linalg.eigh(matrices)
        return cls(vectors * values.abs().sqrt()[:, None], values.sign())

    def __getitem__(self, samples: slice) -> DenseCurvature:
        return DenseCurvature(self.roots[samples], self.signs[samples])

    def scaled(self, factor: float) -> DenseCurvature:
        """Return the curvature of the loss times a positive factor."""
        return DenseCurvature(factor**0.5 * self.roots, self.signs)

    @property
    def num_classes(self) -> int:
        """``K``, the number of classes."""
        return self.roots.shape[1]

    @property
    def num_columns(self) -> int:
        """The number of columns of ``B``."""
        return self.roots.shape[2]

    def column(self, index: int) -> Tensor:
        """Return one column of ``B``, ``(N, K)``."""
        return self.roots[:, :, index]

    def centred(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` unchanged: for a general loss, subtracting the mean row could change ``VᵀΛV``."""
        return matrix

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        """Factor ``VᵀΛV`` into the columns ``BᵀV`` and their signs, where ``V`` is ``matrix``.

        ``scales`` and ``tolerance`` have no effect, because no columns are left out.
        """
        columns = self.roots.mT.to(matrix.dtype) @ matrix
        return Projection(columns, [columns.shape[1]] * len(columns), signs=self.signs.to(matrix.dtype))

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Compute the diagonal of ``VᵀΛV`` for every sample, float64 ``(N, S)``; ``V`` is ``matrix``."""
        return ((self.roots.mT @ matrix.double()).square() * self.signs[:, :, None]).sum(1)

    def summed(self, scales: Tensor) -> Tensor:
        """Compute ``Σ_n scales[n] Λ_n``, float64 ``(K, K)``."""
        scaled = self.roots * (self.signs * scales[:, None])[:, None]
        return (scaled @ self.roots.mT).sum(0)

    def traces(self) -> Tensor:
        """Compute the trace of ``Λ`` of every sample, float64 ``(N,)``."""
        return (self.roots.square() * self.signs[:, None]).sum((1, 2))

    def apply(self, x: Tensor) -> Tensor:
        """Compute ``Λ x``; ``x`` and the result are float64 ``(N, K)``."""
        y = (self.roots.mT @ x[:, :, None]) * self.signs[:, :, None]
        return (self.roots @ y)[:, :, 0]


def _sum_of_squares(weights: Tensor, matrix: Tensor, mean: Tensor | None) -> Tensor:
    """Compute ``Σ_k w_k (v_k - m)[s]²`` for every sample and filter ``s``, float64 ``(N, S)``.

    ``w`` are the sample's weights, ``v_k`` is row ``k`` of ``matrix``, and ``m`` the sample's row of ``mean``. If
    ``mean`` is None, ``m`` is zero.
    """
    if mean is None:
        return (weights.to(matrix.dtype) @ matrix.square()).double()
    # Subtract before squaring: if π is close to one-hot, the terms of the expanded squares would cancel.
    rows = max(1, ELEMENTS // matrix.numel())
    parts = [
        torch.einsum("nk,nks->ns", w.to(matrix.dtype), (matrix - m[:, None]).square())
        for w, m in zip(weights.split(rows), mean.split(rows), strict=True)
    ]
    return torch.cat(parts).double()


def _kept(
    weights: Tensor, matrix: Tensor, mean: Tensor | None, scales: Tensor, floor: Tensor | None, tolerance: float
) -> Tensor:
    """Return a mask ``(N, K)`` of the pairs (sample, class) that are used; the others may be left out.

    A pair adds ``w_k Σ_s scales[s] (v_k - m)[s]²`` to the trace ``t`` in :meth:`ClassCurvature.project`. Here ``v_k``
    is row ``k`` of ``matrix``, and ``m`` the sample's row of ``mean``. Pairs are left out in ascending order of these
    terms, as long as the terms left out sum to less than ``tolerance * t``. A bound on rounding errors is added to
    every term and subtracted from ``t``, so that the tolerance holds despite rounding.
    """
    squares, scales = matrix.square(), scales.to(matrix.dtype)
    parts = size = scales @ squares.T
    if mean is not None:
        of_mean = (scales * mean.square()).sum(1, keepdim=True)
        parts, size = parts - 2 * (scales * mean) @ matrix.T + of_mean, parts + of_mean
    slack = (4 * matrix.shape[1] ** 0.5 + 16) * torch.finfo(matrix.dtype).eps * size
    whole = (weights * (parts - slack).clamp_min(0)).sum()
    if floor is not None:
        whole = whole + (floor * (scales @ squares.sum(0))).sum()
    ordered, order = (weights * (parts.clamp_min(0) + slack)).flatten().sort()
    kept = ordered.cumsum(0) >= tolerance * whole
    return torch.empty_like(kept).scatter_(0, order, kept).view_as(weights)


def _sum_over_dropped(weights: Tensor, matrix: Tensor, mean: Tensor | None) -> Tensor:
    """Compute the same sums as :func:`_sum_of_squares`, but expand the squares, which is faster.

    Requires: all weights of a sample, except the largest one, are small.
    """
    w = weights.to(matrix.dtype)
    if mean is None:
        return (w @ matrix.square()).double()
    # The row of the class with the largest weight is close to the mean, so for this class subtract before squaring.
    largest, top = w.max(1, keepdim=True)
    w = w.scatter(1, top, 0.0)
    total = w @ matrix.square() - 2 * mean * (w @ matrix) + w.sum(1, keepdim=True) * mean.square()
    return (total.clamp_min(0) + largest * (matrix[top[:, 0]] - mean).square()).double()
