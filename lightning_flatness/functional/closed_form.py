"""The closed form: block traces of a convolution, elementwise layers, global pooling and a linear classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.autograd_curvature import Curvature
from lightning_flatness.functional.patches import (
    ConvolutionGeometry,
    contraction_costs,
    patch_gram,
    patch_square_norms,
    patches,
)
from lightning_flatness.functional.symmetric import mirror_, strip_rows

# Numbers in the factors of one chunk of samples, and in the matrix products computed at a time. On a CPU the products
# should fit into the cache. On other devices large products are faster.
FACTOR_ELEMENTS = {"cpu": 2**24}
PRODUCT_ELEMENTS = {"cpu": 2**19}
ELEMENTS_ELSEWHERE = 2**26
# If classes times positions is at most this, one matrix product over all pairs of a class and a position is fastest.
FEW = 24
# Largest number of samples that are summed in the dtype of the factors instead of float64.
MOST_SAMPLES = 64


def closed_form_block_traces(
    inputs: Tensor,
    geometry: ConvolutionGeometry,
    slopes: Tensor,
    head: Tensor,
    curvature: Curvature,
    tolerance: float = 0.0,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute the block traces of the Hessian, summed over samples, for piecewise-linear activations.

    .. math::
        T = \sum_n (V^\top \Lambda V) \circ (a \Gamma a^\top)

    Here ``a[s, p] = dg[c(s)] / dz[s, p]`` are slopes, ``Γ`` is the patch Gram matrix, and ``V[:, s] = weight[:, c(s)]``
    are columns of the classifier's weight. The result is exact if every input ``g[c(s)]`` of the classifier is a sum of
    piecewise-linear functions of single entries ``z[s, p]``. For curved functions add :func:`closed_form_residual`. The
    result is float64: symmetric ``(G, S/G, S/G)``, or ``(G, S/G)`` with ``diagonal``. See Taleghani et al. 2026 (arXiv
    2603.09016) for ReLU, and ``docs/theory.md``, "The closed form", for the derivation.

    Args:
        inputs: inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.
        slopes: ``a``, ``(N, S, *output)``.
        head: ``V``, ``(K, S)``.
        curvature: ``Λ`` of all ``N`` samples.
        tolerance: leave out pairs of sample and class that together contribute at most this share of the trace. The
            diagonal of the result stays exact. The error off the diagonal is that of a positive semi-definite matrix
            whose trace is at most this share. Has an effect only on a :class:`ClassCurvature`, without ``diagonal``.
        diagonal: compute only ``T[s, s]``, which is much less work.
        chunk_size: number of samples per chunk; by default as many as fit into a small memory budget.

    Example:
        >>> from lightning_flatness.functional import ClassCurvature
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> z = torch.conv2d(x, w, padding=1)
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> slopes = (z > 0).double() / 36  # ReLU and global average pooling
        >>> V, pi = torch.randn(5, 4).double(), torch.full((2, 5), 0.2).double()
        >>> closed_form_block_traces(x, geometry, slopes, V, ClassCurvature(pi, pi)).shape
        torch.Size([1, 4, 4])
    """
    samples, filters = slopes.shape[:2]
    groups = geometry.groups
    per_group = filters // groups
    slopes = slopes.reshape(samples, groups, per_group, -1)
    positions = slopes.shape[3]
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram, by_sum = contraction_costs(positions, patch_length, per_group, diagonal=diagonal)
    use_gram = by_gram <= by_sum
    budget = FACTOR_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
    if chunk_size is None:
        patch_elements = groups * positions * (positions if use_gram else patch_length)
        chunk_size = max(1, budget // (filters * (head.shape[0] + 2 * positions) + patch_elements))
        chunk_size = min(chunk_size, MOST_SAMPLES)
    strip_elements = groups * strip_rows(per_group) * per_group
    at_once = max(1, PRODUCT_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE) // strip_elements)

    head = curvature.centred(head)
    on_diagonal = torch.zeros(groups, per_group, dtype=torch.float64, device=inputs.device)
    total = on_diagonal.new_zeros(groups, per_group, 0 if diagonal else per_group)
    shared: Tensor | None = None  # sum over samples of floor · (a Γ aᵀ), the factor of VᵀV
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        left = right = slopes[chunk]
        if use_gram:
            right = left @ patch_gram(inputs[chunk], geometry)
        else:
            left = right = left @ patches(inputs[chunk], geometry).mT  # (N, G, s, D), sum_p a[s, p] phi[p]
        scales = (left * right).sum(3) if diagonal or tolerance > 0 else None  # the diagonal of aΓaᵀ
        if diagonal:
            centred = curvature[chunk].diagonal(head).unflatten(1, (groups, per_group))
            on_diagonal += (centred * scales).sum(0)
            continue
        projected = curvature[chunk].project(head, None if scales is None else scales.flatten(1), tolerance)
        columns = projected.columns.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1)  # (N, G, s, C)
        signed = columns if projected.signs is None else columns * projected.signs[:, None, None]
        if projected.others is not None:
            signed = projected.others.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1)
        floor = None if projected.floor is None else projected.floor.to(left)
        if floor is not None and shared is None:
            shared = torch.zeros_like(total)
        few = columns.shape[3] * left.shape[3] <= FEW and floor is None
        size = 0 if few else min(at_once, len(left)) * strip_elements
        buffers = [None if torch.is_grad_enabled() else like.new_empty(size) for like in (left, columns)]
        for rows, rest in _strips(per_group):
            factors = (right[:, :, rows], left[:, :, rest], columns[:, :, rows], signed[:, :, rest])
            if few:
                total[:, rows, rest] += _sum_of_all_products(*factors)
                continue
            sums, sums_of_floor = _sums_of_products(*factors, projected.counts, floor, at_once, buffers)
            total[:, rows, rest] += sums
            if shared is not None:
                shared[:, rows, rest] += sums_of_floor
        if projected.rest is not None and scales is not None:
            on_diagonal += (projected.rest.unflatten(1, (groups, per_group)) * scales).sum(0)
    if diagonal:
        return on_diagonal
    total.diagonal(dim1=1, dim2=2).add_(on_diagonal)
    if shared is not None:
        head_by_group = head.unflatten(1, (groups, per_group)).permute(1, 2, 0)  # (G, s, K)
        for rows, rest in _strips(per_group):
            total[:, rows, rest] += (head_by_group[:, rows] @ head_by_group[:, rest].mT) * shared[:, rows, rest]
    return mirror_(total)


def _strips(filters: int) -> Iterator[tuple[slice, slice]]:
    """Yield for every strip of the upper triangle its rows, and its columns from the diagonal to the right."""
    size = strip_rows(filters)
    for row in range(0, filters, size):
        yield slice(row, row + size), slice(row, None)


def _sums_of_products(
    right: Tensor,
    left: Tensor,
    columns: Tensor,
    signed: Tensor,
    counts: Sequence[int],
    floor: Tensor | None,
    at_once: int,
    buffers: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Sum ``(columns signedᵀ) ∘ (right leftᵀ)`` over samples, and ``floor · (right leftᵀ)``: ``(G, rows, rest)`` each.

    The factors are ``(N, G, rows or rest, P or D)`` and ``(N, G, rows or rest, C)``. Of the ``C`` columns of sample
    ``n``, the first ``counts[n]`` are used. Products are computed for ``at_once`` samples at a time, in ``buffers``
    unless these are None.
    """
    sums = left.new_zeros(left.shape[1], right.shape[2], left.shape[2])
    sums_of_floor = torch.zeros_like(sums)
    for first in range(0, len(left), at_once):
        some = slice(first, first + at_once)
        most = max(counts[some])
        features = _product(right[some], left[some], buffers[0])
        products = _product(columns[some, ..., :most], signed[some, ..., :most], buffers[1])
        products *= features
        sums += products.sum(0)
        if floor is not None:
            sums_of_floor += (floor[some] @ features.flatten(1)).view_as(sums)
    return sums, sums_of_floor


def _product(one: Tensor, other: Tensor, buffer: Tensor | None) -> Tensor:
    """Compute ``one @ otherᵀ`` of ``(N, G, s, C)``, in ``buffer`` unless it is None (autograd needs new memory)."""
    if buffer is None:
        return one @ other.mT
    shape = (*one.shape[:3], other.shape[2])
    return torch.matmul(one, other.mT, out=buffer[: prod(shape)].view(shape))


def _sum_of_all_products(right: Tensor, left: Tensor, columns: Tensor, signed: Tensor) -> Tensor:
    """Sum ``(columns signedᵀ) ∘ (right leftᵀ)`` over samples by one matrix product over pairs of class and position."""
    rows, rest = (
        (c[..., None] * f[..., None, :]).flatten(3).permute(1, 2, 0, 3).flatten(2)  # (G, s, N C P)
        for c, f in ((columns, right), (signed, left))
    )
    return rows @ rest.mT


def classifier_block_traces(features: Tensor, curvature: Curvature) -> Tensor:
    r"""Compute the block traces of the classifier's own Hessian, summed over samples: ``T = \sum_n ‖g_n‖² Λ_n``.

    The result is exact, since the logits are linear in the classifier's weight. The inputs of the classifier are ``g``,
    ``(N, m)``, and ``Λ`` is the curvature at the logits ``g Wᵀ + b``. The result is float64 ``(1, K, K)``. Petzka et
    al. 2021 (arXiv 2001.00939), Definition 3, compute the same from the whole Hessian.

    Example:
        >>> from lightning_flatness.functional import CrossEntropy, relative_flatness, weight_gram
        >>> g, targets, classifier = torch.randn(8, 20), torch.arange(8) % 5, torch.nn.Linear(20, 5)
        >>> loss = CrossEntropy()(classifier(g).detach(), targets)
        >>> mean = classifier_block_traces(g, loss.curvature) / loss.normalizer
        >>> bool(relative_flatness(mean, weight_gram(classifier.weight)) > 0)
        True
    """
    norms = torch.linalg.vector_norm(features.flatten(1), dim=1, dtype=torch.float64)  # float16 squares overflow
    return curvature.summed(norms.square())[None]


def closed_form_residual(
    inputs: Tensor, geometry: ConvolutionGeometry, curvatures: Tensor, head: Tensor, residual: Tensor
) -> Tensor:
    r"""Compute the terms ``\sum_n r_s \sum_p a'[s, p] Γ[p, p]`` that curved activations add to ``T[s, s]``.

    Here ``r = Vᵀ dloss/df``. The argument ``residual`` is ``dloss/df``, ``(N, K)``, and ``curvatures`` are the slopes'
    derivatives ``a' = da / dz``, ``(N, S, *output)``. The other arguments are as in :func:`closed_form_block_traces`.
    The result is float64 ``(G, S/G)``, summed over samples (``docs/theory.md``, "The closed form").

    Example:
        >>> x = torch.randn(2, 3, 6, 6).double()
        >>> geometry = ConvolutionGeometry(kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> a_prime, V, residual = torch.ones(2, 4, 6, 6), torch.randn(5, 4), torch.randn(2, 5)
        >>> closed_form_residual(x, geometry, a_prime, V, residual).shape
        torch.Size([1, 4])
    """
    samples, filters = curvatures.shape[:2]
    by_group = (geometry.groups, filters // geometry.groups)
    a_prime = curvatures.reshape(samples, *by_group, -1).double()
    norms = patch_square_norms(inputs, geometry).double()
    pulled = (residual.double() @ head.double()).unflatten(1, by_group)
    diagonal: Tensor = (pulled * torch.einsum("ngsp,ngp->ngs", a_prime, norms)).sum(0)
    return diagonal
