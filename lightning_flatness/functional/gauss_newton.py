"""The Gauss-Newton method, which computes block traces of a layer from gradients at the layer's output.

It works for any convolution or linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.patches import ConvolutionGeometry, contraction_costs, patch_gram, patches_times
from lightning_flatness.functional.products import ELEMENTS_ELSEWHERE
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

# Largest number of entries of the intermediate results of one chunk of samples. On a CPU, this number of entries fits
# into the cache of a core; on other devices it is ELEMENTS_ELSEWHERE.
CHUNK_ELEMENTS = {"cpu": 2**19}


def gauss_newton_block_traces(
    calls: Sequence[tuple[Tensor, ConvolutionGeometry]],
    cotangents: Sequence[Sequence[Tensor]],
    signs: Tensor | None = None,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the block traces of one layer's Gauss-Newton matrix, summed over samples and the given columns.

        T = Σ_n Σ_b J_b J_bᵀ,    J_b = Σ_p δ_b[:, p] phi[p]ᵀ

    Here ``phi[p]`` is the input patch at output position ``p``. Let ``Λ`` be the Hessian of the loss with respect to
    the logits, and ``B`` a matrix with ``B Bᵀ = Λ``. Then ``δ_b`` is column ``b`` of ``B``, pulled back from the logits
    to the layer's output by a vector-Jacobian product. To get the full Gauss-Newton matrix, give the ``δ_b`` of all
    columns. This matrix equals the Hessian if the logits are affine in the layer's weight (``docs/theory.md``, "Any
    layer: Gauss-Newton"). A linear layer counts as a convolution of kernel size one over its tokens. The result is a
    float64 tensor ``(G, S/G, S/G)``, symmetric up to rounding. With ``diagonal`` it has only the diagonals,
    ``(G, S/G)``.

    Args:
        calls: the input ``(N, C, *spatial)`` and the geometry of every call of the layer in one forward pass. If there
            are several calls, ``J_b`` is the sum over the calls.
        cotangents: for every call, the list of the ``δ_b`` at its output, each ``(N, S, *output)``.
        signs: signs of the columns, ``(N, number of columns)``, with ``Λ = B diag(signs) Bᵀ``. They are needed if ``Λ``
            has negative eigenvalues.
        diagonal: compute only ``T[s, s]``, which is much less work.
        chunk_size: number of samples per chunk; by default as many as fit into a small memory budget.

    Example:
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> columns = [torch.randn(2, 4, 4, 4).double() for _ in range(5)]
        >>> gauss_newton_block_traces([(x, geometry)], [columns]).shape
        torch.Size([1, 4, 4])
    """
    return gauss_newton_contraction(calls, cotangents, signs, None, diagonal, chunk_size).total


def gauss_newton_contraction(
    calls: Sequence[tuple[Tensor, ConvolutionGeometry]],
    cotangents: Sequence[Sequence[Tensor]],
    signs: Tensor | None = None,
    weighting: Weighting | None = None,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Contraction:
    """Compute block traces like :func:`gauss_newton_block_traces` and, with a ``weighting``, each sample's measures."""
    columns = len(cotangents[0])
    samples, filters = cotangents[0][0].shape[:2]
    inputs, geometry = calls[0]
    groups = geometry.groups
    per_group = filters // groups
    sizes = [of_call[0][0, 0].numel() for of_call in cotangents]
    positions = sum(sizes)
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram, by_sum = contraction_costs(positions, patch_length, per_group, columns, diagonal)
    use_gram = len(calls) == 1 and by_gram <= by_sum
    if chunk_size is None:
        length = positions if use_gram else patch_length
        elements = columns * filters * (positions + length) + (groups * positions**2 if use_gram else 0)
        elements += filters * min(per_group, columns * length) if weighting is not None and not diagonal else 0
        budget = CHUNK_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
        chunk_size = max(1, budget // elements)

    shape = (groups, per_group) if diagonal else (groups, per_group, per_group)
    total = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    values = no_values(samples, inputs.device)
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        # Columns are stacked one chunk at a time, so that the chunk stays in the cache.
        parts = [
            torch.stack([column[chunk] for column in of_call], dim=1)
            .reshape(-1, columns, groups, per_group, size)
            .transpose(1, 2)
            for of_call, size in zip(cotangents, sizes, strict=True)
        ]  # (N, G, B, s, P)
        of_columns = None if signs is None else signs[chunk, None, :, None, None]
        here = [(x[chunk], how) for x, how in calls]
        features = _features(parts, here, use_gram)
        left, right = features[0] if of_columns is None else features[0] * of_columns, features[1]
        of_filters = (left * right).sum((2, 4)) if diagonal or weighting is not None else None  # (N, G, s)
        if of_filters is not None:
            values[chunk, TRACE] = of_filters.flatten(1).sum(1, dtype=torch.float64)
        if diagonal and of_filters is not None:
            total += of_filters.sum(0).double()
        elif per_group > (1 if weighting is None else columns) * left.shape[-1]:
            # A single matrix product also sums over samples and columns. Separate products would take more memory.
            first, second = (factor.permute(1, 3, 0, 2, 4).flatten(2) for factor in (left, right))
            total += (first @ second.mT).double()
            if weighting is not None and weighting.gram is not None:
                values[chunk, RELATIVE] = _weighted(weighting.gram, left, right)
        elif weighting is None:
            total += (left @ right.mT).sum((0, 2)).double()
        else:
            of_samples = _by_filter(left) @ _by_filter(right).mT  # (N, G, s, s)
            total += of_samples.sum(0).double()
            if weighting.gram is not None:
                values[chunk, RELATIVE] = (of_samples.flatten(1) @ weighting.gram.flatten().to(of_samples)).double()
        if weighting is None:
            continue
        if weighting.normalized is not None and not diagonal:
            one, other = (
                (features[0], _features(parts, [(weighting.scaled(x), how) for x, how in here], True)[1])
                if use_gram
                else (weighting.scaled_patches(features[0]),) * 2
            )
            one = one if of_columns is None else one * of_columns
            values[chunk, NORMALIZED] = _weighted(weighting.normalized, one, other)
        if weighting.kernel is not None:
            jacobians = _features(parts, here, False)[0].unbind(2) if use_gram else features[0].unbind(2)
            of_column = [channelwise_values(weighting.kernel, one, one) for one in jacobians]
            values[chunk, CHANNELWISE] = sum(
                of_column if signs is None else [v * signs[chunk, b] for b, v in enumerate(of_column)],
                values.new_zeros(()),
            )
    return Contraction(total, values, total.new_zeros(()))


def _features(
    parts: Sequence[Tensor], calls: Sequence[tuple[Tensor, ConvolutionGeometry]], use_gram: bool
) -> tuple[Tensor, Tensor]:
    """Return a pair ``(left, right)`` with ``left rightᵀ = δ Γ δᵀ`` for every sample and column.

    With ``use_gram``, ``left`` is ``δ`` and ``right`` is ``δ Γ``; otherwise both are ``sum_p δ[p] phi[p]``. ``parts``
    holds the ``δ`` of every call, ``(N, G, B, s, P)``, for ``B`` columns. ``Γ`` is the patch Gram matrix.
    """
    if use_gram:
        left, (inputs, geometry) = parts[0], calls[0]
        # Columns and filters share a dimension, so that one matrix product per sample and group is enough.
        return left, (left.flatten(2, 3) @ patch_gram(inputs, geometry)).view_as(left)
    products = [patches_times(delta.flatten(2, 3), x, how) for delta, (x, how) in zip(parts, calls, strict=True)]
    summed = sum(products[1:], products[0]).unflatten(2, parts[0].shape[2:4])
    return summed, summed  # (N, G, B, s, D)


def _weighted(gram: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute each sample's inner product of ``gram`` with ``left rightᵀ``, summed over columns, float64 ``(N,)``."""
    product = gram.to(left) @ _by_filter(left)
    return (product * _by_filter(right)).flatten(1).sum(1).double()


def _by_filter(features: Tensor) -> Tensor:
    """Merge the dimension of columns into the last dimension: ``(N, G, B, s, F)`` becomes ``(N, G, s, B F)``."""
    return features.transpose(2, 3).flatten(3)
