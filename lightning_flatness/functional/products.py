"""Sum elementwise products of two matrices over samples, for the closed form (``closed_form.py``).

Each of the two matrices is itself a matrix product. The sums are symmetric, so only their upper triangles are computed,
in strips. A strip is a block of rows, from the diagonal to the right (``symmetric.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.symmetric import strip_rows

# Largest number of entries of the matrix products that are computed together. On a CPU the products should fit into the
# cache. On other devices large products are faster.
PRODUCT_ELEMENTS = {"cpu": 2**19}
ELEMENTS_ELSEWHERE = 2**26
# Up to this number of pairs (column, position) of a sample, one matrix product over all pairs is fastest. In features
# of the shape (N, G, s, D), the entries of a filter take the place of positions.
FEW = 24

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Factors:
    """The factors of ``(columns othersᵀ) ∘ (left rightᵀ) + floor · VᵀV ∘ (left rightᵀ)`` for some samples.

    Column ``s`` of ``V``, ``(K, S)``, is the classifier's weight for filter ``s``, centred as in ``curvature.py``.

    Attributes:
        features: ``(left, right)``, each ``(N, G, s, P)`` if made from patch Gram matrices, ``(N, G, s, D)`` if made
            from patches.
        normalized: the same pair, computed from inputs whose channels are divided by their standard deviation; or None.
        columns: ``(columns, others)``, each ``(N, G, s, C)``, where ``C`` is the number of columns.
        counts: for every sample, how many of its ``C`` columns are used; later columns are zero.
        floor: the smallest class weight of every sample, ``(N,)``; None if the term with ``floor`` is missing.
    """

    features: Pair
    normalized: Pair | None
    columns: Pair
    counts: Sequence[int]
    floor: Tensor | None = None

    @property
    def are_few(self) -> bool:
        """Whether a sample has so few pairs (column, position) that one matrix product over all pairs is fastest."""
        return self.columns[0].shape[3] * self.features[0].shape[3] <= FEW and self.floor is None


@dataclass(frozen=True)
class Matrices:
    """Matrices of one layer, each ``(G, s, s)`` or None; :class:`Weighting` defines ``gram`` and ``normalized``."""

    gram: Tensor | None
    normalized: Tensor | None
    head_gram: Tensor | None = None  # VᵀV


@dataclass(frozen=True)
class Totals:
    """The sums over all samples so far. :func:`add_products` adds to their upper triangles in place."""

    products: Tensor  # (G, s, s), float64
    of_floor: Tensor | None = None  # sum of floor · (left rightᵀ)


def add_products(totals: Totals, factors: Factors, matrices: Matrices) -> Tensor:
    """Add one matrix per sample to the totals, and return two inner products for every sample, float64 ``(N, 2)``.

    :class:`Factors` defines the matrix of a sample. Column 0 of the result is the inner product of this matrix with
    ``matrices.gram``. It is the Gauss-Newton part of the sample's relative flatness, without the terms in
    ``Projection.rest``. Column 1 is the same for normalised relative flatness, from ``factors.normalized`` and
    ``matrices.normalized``. If one of the two fields of ``matrices`` is None, its column is zero.
    """
    features, per_group = factors.features, factors.features[0].shape[2]
    values = torch.zeros(len(features[0]), 2, dtype=torch.float64, device=features[0].device)
    if factors.are_few:
        for rows, rest in strips(per_group):
            totals.products[:, rows, rest] += _all_pairs(factors, rows) @ _all_pairs(factors, rest, right=True).mT
        for index, (gram, pair) in enumerate(((matrices.gram, features), (matrices.normalized, factors.normalized))):
            if gram is not None and pair is not None:
                values[:, index] = _quadratic_forms(gram, pair, factors.columns)
        return values
    elements = features[0].shape[1] * strip_rows(per_group) * per_group
    at_once = max(1, PRODUCT_ELEMENTS.get(values.device.type, ELEMENTS_ELSEWHERE) // elements)
    size = min(at_once, len(values)) * elements
    likes = (features[0], factors.columns[0], features[0])
    buffers = [None if torch.is_grad_enabled() else like.new_empty(size) for like in likes]
    for rows, rest in strips(per_group):
        weights = _Weights.of(matrices, rows, rest, features[0])
        for first in range(0, len(values), at_once):
            some = slice(first, first + at_once)
            values[some] += _add_some(totals, factors, weights, (rows, rest), some, buffers)
    return values


def _add_some(
    totals: Totals,
    factors: Factors,
    weights: _Weights,
    strip: tuple[slice, slice],
    some: slice,
    buffers: Sequence[Tensor | None],
) -> Tensor:
    """Add one strip to ``totals``, summed over the ``n`` samples in the slice ``some``.

    Return what the strip contributes to the result of :func:`add_products`, ``(n, 2)``.
    """
    features = _product(factors.features, some, strip, buffers[0])
    products = _product(factors.columns, some, strip, buffers[1], max(factors.counts[some]))
    floor = None if factors.floor is None else factors.floor[some]
    values = torch.zeros(len(products), 2, dtype=torch.float64, device=products.device)
    if weights.normalized is not None and factors.normalized is not None:
        # Only a sum over pairs of filters is needed, so the product of the normalised features is not computed.
        one, other = (factors.normalized[side][some, :, strip[side]] for side in (0, 1))
        weighted = _elementwise(products, weights.normalized.view(products.shape[1:]), buffers[2])
        values[:, 1] += ((weighted @ other) * one).flatten(1).sum(1)
        if floor is not None and weights.normalized_floor is not None:
            on_floor = weights.normalized_floor.view(products.shape[1:]) @ other
            values[:, 1] += floor * (on_floor * one).flatten(1).sum(1)
    products *= features
    totals.products[:, strip[0], strip[1]] += products.sum(0)
    if weights.gram is not None:
        values[:, 0] += products.flatten(1) @ weights.gram
    if floor is not None and totals.of_floor is not None:
        totals.of_floor[:, strip[0], strip[1]] += (floor @ features.flatten(1)).view_as(features[0])
        if weights.gram_floor is not None:
            values[:, 0] += floor * (features.flatten(1) @ weights.gram_floor)
    return values


@dataclass(frozen=True)
class _Weights:
    """One strip of each Gram matrix, flattened.

    In ``gram_floor`` and ``normalized_floor``, the strip is multiplied elementwise by ``VᵀV``. A field is None if it is
    not needed.
    """

    gram: Tensor | None
    normalized: Tensor | None
    gram_floor: Tensor | None
    normalized_floor: Tensor | None

    @classmethod
    def of(cls, matrices: Matrices, rows: slice, rest: slice, like: Tensor) -> _Weights:
        """Cut out one strip in the dtype of ``like``; double the entries whose mirror images are in no strip."""

        def strip_of(gram: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
            if gram is None:
                return None
            strip = gram[:, rows, rest].clone()
            strip[:, :, rows.stop - rows.start :] *= 2
            return (strip if factor is None else strip * factor[:, rows, rest]).flatten().to(like)

        grams, head_gram = (matrices.gram, matrices.normalized), matrices.head_gram
        of_floor = (None, None) if head_gram is None else (strip_of(gram, head_gram) for gram in grams)
        return cls(*map(strip_of, grams), *of_floor)


def strips(filters: int) -> Iterator[tuple[slice, slice]]:
    """Yield for every strip the slice of its rows and the slice of its columns, from the diagonal to the right."""
    size = strip_rows(filters)
    for row in range(0, filters, size):
        yield slice(row, row + size), slice(row, None)


def _product(
    pair: Pair, some: slice, strip: tuple[slice, slice], buffer: Tensor | None, most: int | None = None
) -> Tensor:
    """Compute one strip of ``one @ otherᵀ``, where ``pair`` is ``(one, other)``, for the samples ``some``.

    Only the first ``most`` columns of the pair are used. The result is written to ``buffer``. If ``buffer`` is None,
    new memory is used, which autograd needs.
    """
    one, other = pair[0][some, :, strip[0], :most], pair[1][some, :, strip[1], :most]
    if buffer is None:
        return one @ other.mT
    shape = (*one.shape[:3], other.shape[2])
    return torch.matmul(one, other.mT, out=buffer[: prod(shape)].view(shape))


def _elementwise(products: Tensor, weights: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return products * weights
    return torch.mul(products, weights, out=buffer[: products.numel()].view(products.shape))


def _all_pairs(factors: Factors, rows: slice, right: bool = False) -> Tensor:
    """Multiply every column by the features at every position, for the filters ``rows``: ``(G, rows, N C P)``."""
    columns, features = factors.columns[right][:, :, rows], factors.features[right][:, :, rows]
    return (columns[..., None] * features[..., None, :]).flatten(3).permute(1, 2, 0, 3).flatten(2)


def _quadratic_forms(gram: Tensor, features: Pair, columns: Pair) -> Tensor:
    """Compute the inner product of ``gram`` with ``(columns othersᵀ) ∘ (left rightᵀ)`` of every sample, ``(N,)``.

    The function multiplies every column by the features at every position, as :func:`_all_pairs` does.
    """
    one, other = ((c[..., None] * f[..., None, :]).flatten(3) for c, f in zip(columns, features, strict=True))
    return ((gram.to(one) @ one) * other).flatten(1).sum(1).double()
