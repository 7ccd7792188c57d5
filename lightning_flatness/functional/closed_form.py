"""The closed form: block traces of a convolution followed by elementwise layers, pooling and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.autograd_curvature import Curvature
from lightning_flatness.functional.curvature import Projection
from lightning_flatness.functional.patches import (
    ConvolutionGeometry,
    contraction_costs,
    patch_gram,
    patch_square_norms,
    patches,
)
from lightning_flatness.functional.products import ELEMENTS_ELSEWHERE, Factors, Matrices, Pair, Totals, add_products
from lightning_flatness.functional.symmetric import mirror_
from lightning_flatness.functional.weighting import (
    CHANNELWISE,
    NORMALIZED,
    RELATIVE,
    TRACE,
    Contraction,
    Weighting,
    channelwise_values,
    no_values,
)

# Largest number of entries that the factors of one chunk of samples may have. On devices that are not listed, it is
# ELEMENTS_ELSEWHERE.
FACTOR_ELEMENTS = {"cpu": 2**24}
# Largest number of samples in a chunk on the devices that are listed, where sums within a chunk have the dtype of the
# factors. This dtype may be less precise than float64.
MOST_SAMPLES = {"cpu": 64}


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
    """Compute the block traces of the Hessian, summed over samples, for piecewise-linear activations.

        T = Σ_n (VᵀΛV) ∘ (a Γ aᵀ)

    ``T[s, s']`` is the trace of the Hessian's block for the filters ``s`` and ``s'``, and ``∘`` multiplies elementwise.
    Let ``z`` be the output of the convolution, ``g`` the input of the classifier, and ``c(s)`` the index of the entry
    of ``g`` that output channel ``s`` reaches. Then ``a[s, p] = dg[c(s)] / dz[s, p]`` are slopes, and
    ``V[:, s] = weight[:, c(s)]`` are columns of the classifier's weight. ``Γ`` is the patch Gram matrix, and ``Λ`` the
    second derivative of the loss with respect to the logits.

    Let every ``g[c(s)]`` be a sum of functions of single entries ``z[s, p]``. If these functions are piecewise linear,
    the result is exact. If their second derivatives are not zero, add :func:`closed_form_residual`. The result is a
    symmetric float64 tensor ``(G, S/G, S/G)``. With ``diagonal`` it has only the diagonals, ``(G, S/G)``. See Taleghani
    et al. 2026 (arXiv 2603.09016) for ReLU, and ``docs/theory.md``, "The closed form", for the derivation.

    Args:
        inputs: inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.
        slopes: ``a``, ``(N, S, *output)``.
        head: ``V``, columns of the classifier's weight, ``(K, S)``.
        curvature: ``Λ`` of all ``N`` samples.
        tolerance: leave out terms (one per sample and class) that add little to the trace. They sum to a positive
            semi-definite matrix, whose trace is at most ``tolerance`` times the full trace. The result lacks the
            off-diagonal entries of this matrix, but the diagonal of the result stays exact. ``tolerance`` has an effect
            only if ``curvature`` is a :class:`ClassCurvature` and ``diagonal`` is False.
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
    total = closed_form_contraction(
        inputs, geometry, slopes, head, curvature, None, tolerance, diagonal, chunk_size
    ).total
    return total if diagonal else mirror_(total)


def closed_form_contraction(
    inputs: Tensor,
    geometry: ConvolutionGeometry,
    slopes: Tensor,
    head: Tensor,
    curvature: Curvature,
    weighting: Weighting | None = None,
    tolerance: float = 0.0,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Contraction:
    """Compute the block traces of :func:`closed_form_block_traces` and, with a ``weighting``, each sample's measures.

    Of the matrices of block traces, only the upper triangles are computed. Other entries may be wrong.
    With a ``tolerance``, some terms are left out. Normalised relative flatness then changes by at most
    ``Contraction.left_out`` times the spectral norm of ``weighting.normalized``.
    """
    samples, filters = slopes.shape[:2]
    groups = geometry.groups
    by_group = (groups, filters // groups)
    slopes = slopes.reshape(samples, *by_group, -1)
    positions = slopes.shape[3]
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram, by_sum = contraction_costs(positions, patch_length, by_group[1], diagonal=diagonal)
    use_gram = by_gram <= by_sum
    if chunk_size is None:
        patch_elements = groups * positions * (positions if use_gram else patch_length)
        if weighting is not None and weighting.normalized is not None and not diagonal:
            patch_elements *= 2
        budget = FACTOR_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
        chunk_size = max(1, budget // (filters * (head.shape[0] + 2 * positions) + patch_elements))
        chunk_size = min(chunk_size, MOST_SAMPLES.get(inputs.device.type, chunk_size))

    head = curvature.centred(head)
    on_diagonal = torch.zeros(by_group, dtype=torch.float64, device=inputs.device)
    values, left_out = no_values(samples, inputs.device), on_diagonal.new_zeros(())
    totals = Totals(on_diagonal.new_zeros(*by_group, 0 if diagonal else by_group[1]))
    matrices = Matrices(*((None, None) if weighting is None else (weighting.gram, weighting.normalized)))
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        features, other = _features(inputs[chunk], slopes[chunk], geometry, use_gram, None if diagonal else weighting)
        scales = None  # the diagonal of aΓaᵀ
        if diagonal or tolerance > 0 or weighting is not None:
            scales = (features[0] * features[1]).sum(3)
        if diagonal and scales is not None:
            centred = curvature[chunk].diagonal(head).unflatten(1, by_group) * scales
            on_diagonal += centred.sum(0)
            values[chunk, TRACE] = centred.flatten(1).sum(1)
            continue
        projected = curvature[chunk].project(head, None if scales is None else scales.flatten(1), tolerance)
        if projected.floor is not None and matrices.head_gram is None:
            by_filter = head.unflatten(1, by_group).permute(1, 2, 0)  # (G, s, K)
            matrices = replace(matrices, head_gram=by_filter @ by_filter.mT)
            totals = replace(totals, of_floor=torch.zeros_like(totals.products))
        factors = Factors(features, other, *_columns(projected, by_group, features[0]))
        of_samples = add_products(totals, factors, matrices)
        rest = None
        if projected.rest is not None and scales is not None:
            rest = projected.rest.unflatten(1, by_group)
            on_diagonal += (rest * scales).sum(0)
        if weighting is None or scales is None:
            continue
        values[chunk, TRACE] = (_diagonal(factors, matrices, rest) * scales).flatten(1).sum(1)
        values[chunk, RELATIVE], values[chunk, NORMALIZED] = of_samples.unbind(1)
        if weighting.kernel is not None:
            jacobian = slopes[chunk] @ patches(inputs[chunk], geometry).mT
            values[chunk, CHANNELWISE] = _channelwise(weighting.kernel, jacobian, curvature[chunk].project(head))
        if rest is not None and weighting.gram is not None:
            values[chunk, RELATIVE] += _on_diagonal(rest * scales, weighting.gram)
        if rest is not None and other is not None and weighting.normalized is not None:
            of_rest = rest * (other[0] * other[1]).sum(3)
            values[chunk, NORMALIZED] += _on_diagonal(of_rest, weighting.normalized)
            left_out += of_rest.sum()
    if diagonal:
        return Contraction(on_diagonal, values, left_out)
    if matrices.normalized is None:
        values[:, NORMALIZED] = torch.nan
    total = totals.products
    total.diagonal(dim1=1, dim2=2).add_(on_diagonal)
    if totals.of_floor is not None and matrices.head_gram is not None:
        total += matrices.head_gram * totals.of_floor
    return Contraction(total, values, left_out)


def _features(
    inputs: Tensor, slopes: Tensor, geometry: ConvolutionGeometry, use_gram: bool, weighting: Weighting | None
) -> tuple[Pair, Pair | None]:
    """Return a pair ``(left, right)`` with ``left rightᵀ = a Γ aᵀ`` for every sample.

    With ``use_gram``, ``left`` is ``a Γ`` and ``right`` is ``a``; otherwise both are ``sum_p a[s, p] phi[p]``.
    Here ``a`` are the ``slopes``, and ``Γ`` is the patch Gram matrix.

    If the ``weighting`` has the matrix for normalised relative flatness, return the same pair for the scaled inputs,
    too.
    """
    is_normalized = weighting is not None and weighting.normalized is not None
    if not use_gram:
        sums = slopes @ patches(inputs, geometry).mT  # (N, G, s, D)
        scaled = weighting.scaled_patches(sums) if weighting is not None and is_normalized else None
        return (sums, sums), None if scaled is None else (scaled, scaled)
    if weighting is None or not is_normalized:
        return (slopes @ patch_gram(inputs, geometry), slopes), None
    gram, scaled_gram = patch_gram(torch.cat([inputs, weighting.scaled(inputs)]), geometry).chunk(2)
    return (slopes @ gram, slopes), (slopes @ scaled_gram, slopes)


def _columns(
    projected: Projection, by_group: tuple[int, int], like: Tensor
) -> tuple[Pair, Sequence[int], Tensor | None]:
    """Convert a projection to ``(columns, others), counts, floor``, the last three fields of :class:`Factors`.

    ``columns`` and ``others`` have the shape ``(N, G, s, C)``, where ``C`` is the number of columns. Their product
    ``columns othersᵀ`` is the sum in :class:`Projection` without ``floor · VᵀV`` and ``diag(rest)``.
    """
    columns = projected.columns.unflatten(2, by_group).permute(0, 2, 3, 1)
    others = columns if projected.signs is None else columns * projected.signs[:, None, None]
    if projected.others is not None:
        others = projected.others.unflatten(2, by_group).permute(0, 2, 3, 1)
    floor = None if projected.floor is None else projected.floor.to(like)
    return (columns, others), projected.counts, floor


def _channelwise(kernel: Tensor, jacobian: Tensor, projected: Projection) -> Tensor:
    """Compute channel-wise flatness of every sample, ``(N,)``.

    ``kernel`` is the layer's kernel, ``jacobian`` is ``sum_p a[s, p] phi[p]``, ``(N, G, s, D)``, and ``projected``
    holds factors of ``VᵀΛV``.
    """
    columns, others = _columns(projected, (jacobian.shape[1], jacobian.shape[2]), jacobian)[0]
    total = torch.zeros(len(jacobian), dtype=torch.float64, device=jacobian.device)
    for index in range(columns.shape[3]):
        left = columns[..., index, None] * jacobian
        right = left if others is columns else others[..., index, None] * jacobian
        total += channelwise_values(kernel, left, right)
    return total


def _diagonal(factors: Factors, matrices: Matrices, rest: Tensor | None) -> Tensor:
    """Return the diagonal of ``VᵀΛV`` for every sample, ``(N, G, s)``."""
    diagonal = (factors.columns[0] * factors.columns[1]).sum(3).double()
    if factors.floor is not None and matrices.head_gram is not None:
        diagonal += factors.floor[:, None, None] * matrices.head_gram.diagonal(dim1=1, dim2=2)
    return diagonal if rest is None else diagonal + rest


def _on_diagonal(filters: Tensor, gram: Tensor) -> Tensor:
    """Compute ``Σ_{g, s} filters[n, g, s] gram[g, s, s]`` for every sample ``n``, ``(N,)``."""
    weighted: Tensor = (filters * gram.diagonal(dim1=1, dim2=2)).flatten(1).sum(1)
    return weighted


def closed_form_residual(
    inputs: Tensor,
    geometry: ConvolutionGeometry,
    curvatures: Tensor,
    head: Tensor,
    residual: Tensor,
    summed: bool = True,
) -> Tensor:
    """Compute the terms ``Σ_n r_s Σ_p a'[s, p] Γ[p, p]`` that activations with a second derivative add to ``T[s, s]``.

    For every sample ``n``, ``r = Vᵀ dloss/df``, and ``Γ`` is the patch Gram matrix. The terms are zero for
    piecewise-linear activations. The result is float64 ``(G, S/G)``. See ``docs/theory.md``, "The closed form".

    Args:
        inputs: inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.
        curvatures: ``a' = da / dz``, the derivative of the slopes ``a`` with respect to the convolution's output ``z``,
            ``(N, S, *output)``.
        head: ``V``, columns of the classifier's weight, ``(K, S)``; see :func:`closed_form_block_traces`.
        residual: ``dloss/df``, the gradient with respect to the logits, ``(N, K)``.
        summed: sum over samples; with False the result is ``(N, G, S/G)``.

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
    diagonal: Tensor = pulled * torch.einsum("ngsp,ngp->ngs", a_prime, norms)
    return diagonal.sum(0) if summed else diagonal
