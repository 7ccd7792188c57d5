"""Sum elementwise products of two matrices over samples, for the closed form (``closed_form.py``).

Each of the two matrices is itself a matrix product. The sums are symmetric, so only their upper triangles are computed,
in strips. A strip is a block of rows, from the diagonal to the right (``symmetric.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.symmetric import strip_rows

# Largest number of entries of the matrix products that are computed together. On a CPU, two such products should fit
# into the cache. Other devices are fast with few large products.
PRODUCT_ELEMENTS = {"cpu": 2**20}
ELEMENTS_ELSEWHERE = 2**26
# Largest number of strips. With few strips, fewer operations are launched, and more is computed twice.
MOST_STRIPS = {"cpu": 16}
STRIPS_ELSEWHERE = 4
# Up to this number of pairs (column, position) of a sample, one matrix product over all pairs is fastest. In features
# of the shape (N, G, s, D), the entries of a filter take the place of positions.
FEW = 24

Pair = tuple[Tensor, Tensor]
Strip = tuple[slice, slice]  # the rows, and the columns from the diagonal to the right


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
    device = features[0].device.type
    cut = list(strips(per_group, MOST_STRIPS.get(device, STRIPS_ELSEWHERE)))
    if factors.are_few:
        for rows, rest in cut:
            totals.products[:, rows, rest] += _all_pairs(factors, rows) @ _all_pairs(factors, rest, right=True).mT
        values = torch.zeros(len(features[0]), 2, dtype=torch.float64, device=features[0].device)
        for index, (gram, pair) in enumerate(((matrices.gram, features), (matrices.normalized, factors.normalized))):
            if gram is not None and pair is not None:
                values[:, index] = _quadratic_forms(gram, pair, factors.columns)
        return values
    elements = features[0].shape[1] * cut[0][0].stop * per_group
    at_once = max(1, PRODUCT_ELEMENTS.get(device, ELEMENTS_ELSEWHERE) // elements)
    size = min(at_once, len(features[0])) * elements
    likes = (factors.columns[0], features[0])
    buffers = [None if torch.is_grad_enabled() else like.new_empty(size) for like in likes]
    of_strips = [_add_strip(totals, factors, matrices, strip, at_once, buffers) for strip in cut]
    return torch.stack(of_strips).sum(0, dtype=torch.float64)


class _Weights(NamedTuple):
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


class _Part(NamedTuple):
    """The factors of one strip for some samples. ``P`` and ``C`` are as in :class:`Factors`."""

    features: Pair  # (n, G, rows, P) and (n, G, P, rest)
    columns: Pair  # (n, G, rows, C) and (n, G, C, rest)
    normalized: Pair | None  # (n, G, rows, P) and (n, G, rest, P)
    floor: Tensor | None  # (n,)


class _Sums(NamedTuple):
    """What some samples add to one strip of each total, and to the result of :func:`add_products`."""

    products: Tensor  # (G * rows * rest,)
    of_floor: Tensor | None  # the same shape
    values: Tensor  # (n, 2)


def _add_strip(
    totals: Totals, factors: Factors, matrices: Matrices, strip: Strip, at_once: int, buffers: Sequence[Tensor | None]
) -> Tensor:
    """Add one strip to ``totals``, and return what it contributes to the result of :func:`add_products`, ``(N, 2)``.

    The products of ``at_once`` samples are computed together.
    """
    weights = _Weights.of(matrices, *strip, like=factors.features[0])
    values, products, of_floor = [], None, None
    for part in _parts(factors, strip, at_once):
        sums = _sums(part, weights, buffers)
        values.append(sums.values)
        products = sums.products if products is None else products + sums.products
        if sums.of_floor is not None:
            of_floor = sums.of_floor if of_floor is None else of_floor + sums.of_floor
    for total, summed in ((totals.products, products), (totals.of_floor, of_floor)):
        if total is not None and summed is not None:
            view = total[:, strip[0], strip[1]]
            view += summed.view_as(view)
    return torch.cat(values)


def _parts(factors: Factors, strip: Strip, at_once: int) -> Iterator[_Part]:
    """Yield the factors of one strip for ``at_once`` samples after the other."""

    def cut(pair: Pair) -> Iterator[Pair]:
        (one, other), (rows, rest) = pair, strip
        return zip(one[:, :, rows].split(at_once), other[:, :, rest].split(at_once), strict=True)

    normalized = repeat(None) if factors.normalized is None else cut(factors.normalized)
    floors = repeat(None) if factors.floor is None else factors.floor.split(at_once)
    starts = range(0, len(factors.features[0]), at_once)
    for start, (left, right), (column, other), pair, floor in zip(
        starts, cut(factors.features), cut(factors.columns), normalized, floors, strict=False
    ):
        most = max(factors.counts[start : start + at_once])
        yield _Part((left, right.mT), (column[..., :most], other[..., :most].mT), pair, floor)


def _sums(part: _Part, weights: _Weights, buffers: Sequence[Tensor | None]) -> _Sums:
    """Compute the products of some samples, and sum them.

    Results are written to the ``buffers``. Where a buffer is None, new memory is used, which autograd needs.
    """
    products, floor = _product(*part.columns, buffers[0]), part.floor
    shape, relative = products.shape[1:], products.new_zeros(len(products))
    normalized = relative
    if weights.normalized is not None and part.normalized is not None:
        # Only a sum over pairs of filters is needed, so the product of the normalised features is not computed.
        one, other = part.normalized
        weighted = _elementwise(products, weights.normalized.view(shape), buffers[1])
        normalized = ((weighted @ other) * one).flatten(1).sum(1)
        if floor is not None and weights.normalized_floor is not None:
            on_floor = weights.normalized_floor.view(shape) @ other
            normalized = normalized + floor * (on_floor * one).flatten(1).sum(1)
    features = _product(*part.features, buffers[1])
    products *= features
    flat, of_floor = products.flatten(1), None
    if weights.gram is not None:
        relative = flat @ weights.gram
    if floor is not None:
        of_floor = floor @ features.flatten(1)
        if weights.gram_floor is not None:
            relative = relative + floor * (features.flatten(1) @ weights.gram_floor)
    return _Sums(_sum(flat), of_floor, torch.stack([relative, normalized], dim=1))


def _sum(rows: Tensor) -> Tensor:
    """Sum the products of all samples, ``(n, E)``, over the samples."""
    if rows.device.type in PRODUCT_ELEMENTS:
        return rows.new_ones(len(rows)) @ rows  # on a CPU, this is twice as fast as `sum`
    return rows.sum(0, dtype=torch.float64)


def strips(filters: int, most: int) -> Iterator[Strip]:
    """Yield for every strip the slice of its rows and the slice of its columns, from the diagonal to the right."""
    size = strip_rows(filters, most)
    for row in range(0, filters, size):
        yield slice(row, row + size), slice(row, None)


def _product(one: Tensor, other: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return one @ other
    shape = (*one.shape[:3], other.shape[3])
    return torch.matmul(one, other, out=buffer[: prod(shape)].view(shape))


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
