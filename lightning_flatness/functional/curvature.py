r"""The curvature of a loss: its second derivative ``Λ_n`` with respect to the logits of every sample.

Nothing needs ``Λ`` as a matrix. The closed form needs ``VᵀΛV`` for a matrix ``V``, as a product of columns; the
Gauss-Newton method needs a factor ``B``, ``B Bᵀ = Λ``, column by column. Both are offered by the two forms in which
losses have their curvature:

- :class:`ClassCurvature`, a sum over classes: cross-entropy, binary cross-entropy, squared error;
- :class:`DenseCurvature`, any symmetric matrix: a loss that somebody else has written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# From this many classes on, it pays to take apart what all have in common, and to sample those that matter less.
MANY_CLASSES = 128
# Unless so few are left, it is quicker to take all.
WORTHWHILE = 0.9
# Of intermediate results that are made at a time.
ELEMENTS = 2**22


class Projection(NamedTuple):
    """``VᵀΛV = columnsᵀ diag(signs) columns + floor · VᵀV + diag(rest)``, for every sample."""

    columns: Tensor  # (N, C, S)
    counts: list[int]  # of every sample: its columns from there on are zero
    signs: Tensor | None = None  # (N, C), or None for all +1
    floor: Tensor | None = None  # (N,), what all classes of a sample share
    rest: Tensor | None = None  # (N, S): the diagonal of the columns that were dropped


@dataclass(frozen=True)
class ClassCurvature:
    r"""A curvature that is a sum over classes, ``Λ_n = \sum_k w_{nk} (e_k - π_n)(e_k - π_n)ᵀ``.

    Cross-entropy has ``w = c π``, which gives ``c (diag(π) - π πᵀ)``; without ``center`` it is ``diag(w)``.

    Args:
        weights: ``w``, ``(N, K)``, float64, not negative; with a center, a multiple of it for every sample.
        center: ``π``, ``(N, K)``, whose rows add up to one; or None for zero.

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

    @property
    def num_classes(self) -> int:
        """``K``."""
        return self.weights.shape[1]

    @property
    def num_columns(self) -> int:
        """Columns of the factor that :meth:`column` gives: ``K - 1`` with a center, else ``K``."""
        return self.weights.shape[1] - (self.center is not None)

    def factor(self, x: Tensor) -> Tensor:
        """``B x`` with the factor ``B`` of ``K`` columns ``√w_k (e_k - π)``; both ``(N, K)``."""
        y = self.weights.sqrt() * x
        return y if self.center is None else y - self.center * y.sum(1, keepdim=True)

    def column(self, index: int) -> Tensor:
        """One column of a factor with as few columns as can be, ``(N, K)``.

        With a center, ``√π`` is mapped to zero. A reflection that takes the last axis to ``√π``
        turns the last column of the factor to zero, which leaves ``K - 1`` columns to pull back.
        """
        x = torch.zeros_like(self.weights)
        x[:, index] = 1
        if self.center is not None:
            roots = self.center.sqrt()
            x[:, -1] = -roots[:, index] / (1 + roots[:, -1])
        return self.factor(x)

    def centred(self, matrix: Tensor) -> Tensor:
        """``V``, ``(K, S)``, or what can stand for it: with a center, rows matter only up to a common vector."""
        return matrix if self.center is None else matrix - matrix.mean(0)

    @property
    def floor(self) -> Tensor | None:
        """The part of the weights that all classes of a sample share, ``(N,)``; None where that is hardly anything."""
        floor, classes = self.weights.amin(1), self.weights.shape[1]
        worthwhile = classes >= MANY_CLASSES and bool(classes * floor.sum() > 0.01 * self.weights.sum())
        return floor if worthwhile else None

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        r"""Factors of ``VᵀΛV``; with a tolerance, what all classes share is apart, and those that matter least go.

        Columns are centred, ``√w_k (v_k - πᵀV)``: ``diag(π) - π πᵀ`` cancels. Left out are as many classes as add no
        more, in all, than ``tolerance`` of ``\sum_{n,s} scales[n, s] (VᵀΛ_nV)[s, s]``; their diagonal comes apart, so
        that only entries off the diagonal change.

        Args:
            matrix: ``V``, ``(K, S)``, from :meth:`centred`.
            scales: ``(N, S)``, not negative; needed with a tolerance.
            tolerance: relative; zero keeps all classes.
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
        shared = int(mean is not None and floor is not None)  # columns for the mean of all classes
        columns = matrix.new_empty(samples, shared + weights.shape[1], matrix.shape[1])
        of_classes = columns[:, shared:]
        # In place, as these are many: with a thousand classes some ten megabytes for every sample.
        if chosen is not None:
            for rows, indices in zip(of_classes, chosen, strict=True):
                torch.index_select(matrix, 0, indices, out=rows)
        else:
            of_classes.copy_(matrix)
        if mean is not None:
            of_classes -= mean[:, None]
        of_classes *= weights.sqrt().to(matrix.dtype)[:, :, None]
        if shared and mean is not None and floor is not None:  # \sum_k (v_k - m)(v_k - m)ᵀ = VᵀV + K m mᵀ, V centred
            columns[:, 0] = (classes * floor).sqrt().to(matrix.dtype)[:, None] * mean
        return Projection(columns, [count + shared for count in counts], floor=floor, rest=rest)

    def diagonal(self, matrix: Tensor) -> Tensor:
        """The diagonal of ``VᵀΛV``, ``(N, S)``, float64."""
        return _sum_of_squares(self.weights, matrix, None if self.center is None else self.center.to(matrix) @ matrix)

    def summed(self, scales: Tensor) -> Tensor:
        r"""``\sum_n scales[n] Λ_n``, ``(K, K)``, float64."""
        scaled = self.weights * scales[:, None]
        if self.center is None:
            return scaled.sum(0).diag()
        # Rows add up to zero. As minus the sum of the others the diagonal keeps its digits when a sample is sure.
        total = -(scaled.T @ self.center).fill_diagonal_(0)
        return total - total.sum(1).diag()

    def apply(self, x: Tensor) -> Tensor:
        """``Λ x``; both ``(N, K)``, float64."""
        if self.center is None:
            return self.weights * x
        y = self.weights * (x - (self.center * x).sum(1, keepdim=True))
        return y - self.center * y.sum(1, keepdim=True)


@dataclass(frozen=True)
class DenseCurvature:
    """Any symmetric curvature, by its eigenvectors: ``Λ_n = B_n diag(signs) B_nᵀ``; negative directions are allowed.

    Args:
        roots: ``B``, ``(N, K, C)``, float64.
        signs: ``(N, C)``.

    Example:
        >>> curvature = DenseCurvature.of(torch.tensor([[[2.0, 0.0], [0.0, -3.0]]]))
        >>> curvature.signs
        tensor([[-1.,  1.]])
    """

    roots: Tensor  # B, (N, K, C)
    signs: Tensor  # (N, C)

    @classmethod
    def of(cls, matrices: Tensor) -> DenseCurvature:
        """The curvature with these matrices, ``(N, K, K)``, float64."""
        values, vectors = torch.linalg.eigh(matrices)
        return cls(vectors * values.abs().sqrt()[:, None], values.sign())

    def __getitem__(self, samples: slice) -> DenseCurvature:
        return DenseCurvature(self.roots[samples], self.signs[samples])

    @property
    def num_classes(self) -> int:
        """``K``."""
        return self.roots.shape[1]

    @property
    def num_columns(self) -> int:
        """Columns of the factor."""
        return self.roots.shape[2]

    def column(self, index: int) -> Tensor:
        """One column of the factor, ``(N, K)``."""
        return self.roots[:, :, index]

    def centred(self, matrix: Tensor) -> Tensor:
        """``V`` as it is."""
        return matrix

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        """``Bᵀ V`` with all columns."""
        columns = self.roots.mT.to(matrix.dtype) @ matrix
        return Projection(columns, [columns.shape[1]] * len(columns), signs=self.signs.to(matrix.dtype))

    def diagonal(self, matrix: Tensor) -> Tensor:
        """The diagonal of ``VᵀΛV``, ``(N, S)``, float64."""
        return ((self.roots.mT @ matrix.double()).square() * self.signs[:, :, None]).sum(1)

    def summed(self, scales: Tensor) -> Tensor:
        r"""``\sum_n scales[n] Λ_n``, ``(K, K)``, float64."""
        scaled = self.roots * (self.signs * scales[:, None])[:, None]
        return (scaled @ self.roots.mT).sum(0)

    def apply(self, x: Tensor) -> Tensor:
        """``Λ x``; both ``(N, K)``, float64."""
        y = (self.roots.mT @ x[:, :, None]) * self.signs[:, :, None]
        return (self.roots @ y)[:, :, 0]


Curvature = ClassCurvature | DenseCurvature


def _sum_of_squares(weights: Tensor, matrix: Tensor, mean: Tensor | None) -> Tensor:
    r"""``\sum_k w_k (v_k - m)[s]²`` for every sample, ``(N, S)``, float64."""
    if mean is None:
        return (weights.to(matrix.dtype) @ matrix.square()).double()
    # Differences first: for a confident sample those of the products would cancel.
    rows = max(1, ELEMENTS // matrix.numel())
    parts = [
        torch.einsum("nk,nks->ns", w.to(matrix.dtype), (matrix - m[:, None]).square())
        for w, m in zip(weights.split(rows), mean.split(rows), strict=True)
    ]
    return torch.cat(parts).double()


def _kept(
    weights: Tensor, matrix: Tensor, mean: Tensor | None, scales: Tensor, floor: Tensor | None, tolerance: float
) -> Tensor:
    r"""Which classes of which samples are kept, ``(N, K)``.

    A class adds ``w_k \sum_s scales[s] (v_k - m)[s]²``. What rounding leaves open counts for what is dropped, and
    against the whole.
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
    r"""``\sum_k w_k (v_k - m)[s]²``, ``(N, S)``, float64, for weights of which all but the largest are small."""
    w = weights.to(matrix.dtype)
    if mean is None:
        return (w @ matrix.square()).double()
    # The class that a sample is sure of comes apart, as a difference: it is near the mean.
    largest, top = w.max(1, keepdim=True)
    w = w.scatter(1, top, 0.0)
    total = w @ matrix.square() - 2 * mean * (w @ matrix) + w.sum(1, keepdim=True) * mean.square()
    return (total.clamp_min(0) + largest * (matrix[top[:, 0]] - mean).square()).double()
