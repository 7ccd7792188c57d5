"""Closed form: block traces of a convolution under an elementwise tail, global pooling and a linear classifier."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.curvature import Curvature
from lightning_flatness.functional.patches import (
    ConvolutionGeometry,
    contraction_costs,
    patch_gram,
    patch_square_norms,
    patches,
)
from lightning_flatness.functional.symmetric import mirror_, strip_rows

# Elements of one chunk's factors, and of the products of them that are made at a time: on a CPU the products should
# stay in the cache, elsewhere be large.
FACTOR_ELEMENTS = {"cpu": 2**24}
PRODUCT_ELEMENTS = {"cpu": 2**19}
ELEMENTS_ELSEWHERE = 2**26
# With so few products of a class and a position, one matrix product over all of them beats two and an elementwise one.
FEW = 24
# Samples that may be summed in the precision of the factors.
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
    r"""Block traces of the Hessian, summed over the samples of a batch, for piecewise-linear activations.

    .. math::
        T = \sum_n (V^\top \Lambda V) \circ (a \Gamma a^\top)

    with slopes ``a[s, p] = dg[c(s)] / dz[s, p]``, patch Gram matrix ``Γ`` and classifier columns ``V[:, s] = weight[:,
    c(s)]``. Exact when the classifier's input ``g[c(s)]`` is a sum of piecewise-linear functions of single entries
    ``z[s, p]``; for curved ones add :func:`closed_form_residual`. Source: Taleghani et al. 2026 (arXiv 2603.09016) for
    ReLU; the derivation is in ``docs/theory.md``.

    Args:
        inputs: what the convolution reads, ``(N, C, *spatial)``.
        geometry: of the convolution.
        slopes: ``a``, ``(N, S, *output)``.
        head: ``V``, ``(K, S)``.
        curvature: ``Λ``, of ``N`` samples.
        tolerance: leave out classes of samples that add no more, in all, than this part of the trace. What is left out
            is a positive matrix of at most ``tolerance`` times the trace, less its diagonal, which stays. Has no
            effect with ``diagonal`` or a dense curvature.
        diagonal: only ``T[s, s]``, which is much less work.
        chunk_size: samples taken at a time; by default as many as fit a small budget. The result does not depend on it
            beyond rounding and the tolerance, memory does.

    Returns:
        float64 ``(G, S/G, S/G)``, symmetric; with ``diagonal``, ``(G, S/G)``. The sum over samples, not the mean.

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
    strip = strip_rows(per_group)
    if chunk_size is None:
        patch_elements = groups * positions * (positions if use_gram else patch_length)
        chunk_size = max(1, budget // (filters * (head.shape[0] + 2 * positions) + patch_elements))
        chunk_size = min(chunk_size, MOST_SAMPLES)
    of_products = PRODUCT_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
    samples_at_once = max(1, of_products // (groups * strip * per_group))

    head = curvature.centred(head)
    by_group = head.unflatten(1, (groups, per_group)).permute(1, 2, 0)  # (G, s, K)
    of_filters = torch.zeros(groups, per_group, dtype=torch.float64, device=inputs.device)
    total = of_filters.new_zeros(groups, per_group, 0 if diagonal else per_group)
    shared: Tensor | None = None  # what the floor is multiplied with
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        left = right = slopes[chunk]
        if use_gram:
            right = left @ patch_gram(inputs[chunk], geometry)
        else:
            left = right = left @ patches(inputs[chunk], geometry).mT  # (N, G, s, D): sum_p a[s, p] phi[p]
        scales = (left * right).sum(3) if diagonal or tolerance > 0 else None  # the diagonal of aΓaᵀ
        if diagonal:
            centred = curvature[chunk].diagonal(head).unflatten(1, (groups, per_group))
            of_filters += (centred * scales).sum(0)
            continue
        projected = curvature[chunk].project(head, None if scales is None else scales.flatten(1), tolerance)
        columns = projected.columns.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1)  # (N, G, s, C)
        signed = columns if projected.signs is None else columns * projected.signs[:, None, None]
        floor = None if projected.floor is None else projected.floor.to(left)
        if floor is not None and shared is None:
            shared = torch.zeros_like(total)
        few = columns.shape[3] * left.shape[3] <= FEW and floor is None
        size = 0 if few else min(samples_at_once, len(left)) * groups * strip * per_group
        buffers = [None if torch.is_grad_enabled() else like.new_empty(size) for like in (left, columns)]
        for row in range(0, per_group, strip):
            rows, rest = slice(row, row + strip), slice(row, None)
            if few:
                of_all = _all_products(columns[:, :, rows], right[:, :, rows])
                total[:, rows, rest] += of_all @ _all_products(signed[:, :, rest], left[:, :, rest]).mT
                continue
            sums = left.new_zeros(groups, min(strip, per_group - row), per_group - row)
            sums_of_floor = torch.zeros_like(sums)
            for first in range(0, len(left), samples_at_once):
                some = slice(first, first + samples_at_once)
                most = max(projected.counts[some])
                features = _product(right[some, :, rows], left[some, :, rest], buffers[0])
                products = _product(columns[some, :, rows, :most], signed[some, :, rest, :most], buffers[1])
                products *= features
                sums += products.sum(0)
                if floor is not None:
                    sums_of_floor += (floor[some] @ features.flatten(1)).view_as(sums)
            total[:, rows, rest] += sums
            if shared is not None:
                shared[:, rows, rest] += sums_of_floor
        if projected.rest is not None and scales is not None:
            of_filters += (projected.rest.unflatten(1, (groups, per_group)) * scales).sum(0)
    if diagonal:
        return of_filters
    total.diagonal(dim1=1, dim2=2).add_(of_filters)
    if shared is not None:
        for row in range(0, per_group, strip):
            rows, rest = slice(row, row + strip), slice(row, None)
            total[:, rows, rest] += (by_group[:, rows] @ by_group[:, rest].mT) * shared[:, rows, rest]
    return mirror_(total)


def _product(one: Tensor, other: Tensor, buffer: Tensor | None) -> Tensor:
    """``one @ otherᵀ`` of ``(N, G, s, C)``; in memory that is there already, which autograd does not allow."""
    if buffer is None:
        return one @ other.mT
    shape = (*one.shape[:3], other.shape[2])
    return torch.matmul(one, other.mT, out=buffer[: prod(shape)].view(shape))


def _all_products(columns: Tensor, features: Tensor) -> Tensor:
    """All products of a column with a feature, of ``(N, G, s, C)`` and ``(N, G, s, P)``: ``(G, s, N C P)``."""
    products = columns[..., None] * features[..., None, :]
    return products.flatten(3).permute(1, 2, 0, 3).flatten(2)


def classifier_block_traces(features: Tensor, curvature: Curvature) -> Tensor:
    r"""Block traces of the classifier's own Hessian, summed over samples: ``T = \sum_n ‖g_n‖² Λ_n``.

    All that is needed of the network is what its last linear layer reads and returns. Exact, as logits are linear in
    the weight. Source: Petzka et al. 2021 (arXiv 2001.00939), Definition 3, where all of this Hessian is formed.

    Args:
        features: ``g``, what the classifier reads, ``(N, m)``.
        curvature: ``Λ`` at the logits ``g Wᵀ + b``, of ``N`` samples.

    Returns:
        float64 ``(1, K, K)``. The sum over samples, not the mean.

    Example:
        >>> from lightning_flatness.functional import CrossEntropy, relative_flatness, weight_gram
        >>> g, targets, classifier = torch.randn(8, 20), torch.arange(8) % 5, torch.nn.Linear(20, 5)
        >>> loss = CrossEntropy()(classifier(g).detach(), targets)
        >>> mean = classifier_block_traces(g, loss.curvature) / loss.normalizer
        >>> bool(relative_flatness(mean, weight_gram(classifier.weight)) > 0)
        True
    """
    norms = torch.linalg.vector_norm(features.flatten(1), dim=1, dtype=torch.float64)  # squares of float16 overflow
    return curvature.summed(norms.square())[None]


def closed_form_residual(
    inputs: Tensor, geometry: ConvolutionGeometry, curvatures: Tensor, head: Tensor, residual: Tensor
) -> Tensor:
    r"""What curved activations add to the diagonal of the block traces, ``\sum_n r_s \sum_p a'[s, p] Γ[p, p]``.

    Args:
        inputs: what the convolution reads, ``(N, C, *spatial)``.
        geometry: of the convolution.
        curvatures: ``a' = da / dz``, ``(N, S, *output)``.
        head: ``V``, ``(K, S)``; ``r = Vᵀ dloss/df``.
        residual: ``dloss/df``, ``(N, K)``.

    Returns:
        float64 ``(G, S/G)``.

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
