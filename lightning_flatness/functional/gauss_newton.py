"""The Gauss-Newton method: block traces of any convolution or linear layer, from gradients at the layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.patches import ConvolutionGeometry, contraction_costs, patch_gram, patches_times

# Numbers in the largest intermediate results of one chunk of samples. On a CPU they fit into the cache of a core.
CHUNK_ELEMENTS = {"cpu": 2**19}
ELEMENTS_ELSEWHERE = 2**26


def gauss_newton_block_traces(
    calls: Sequence[tuple[Tensor, ConvolutionGeometry]],
    cotangents: Sequence[Sequence[Tensor]],
    signs: Tensor | None = None,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute the block traces of one layer's Gauss-Newton matrix, summed over samples and the given columns.

    .. math::
        T = \sum_n \sum_b J_b J_b^\top, \qquad J_b = \sum_p \delta_b[:, p]\, \phi[p]^\top

    Let ``B Bᵀ = Λ``, the Hessian of the loss with respect to the logits. Then ``δ_b`` is column ``b`` of ``B``,
    backpropagated from the logits to the layer's output. With all columns of ``B``, the result belongs to the
    Gauss-Newton matrix, which equals the Hessian if the logits are affine in the layer's weight (``docs/theory.md``,
    "Any layer: Gauss-Newton"). A linear layer is a convolution of kernel size one over its tokens. The result is
    float64 and symmetric up to rounding, ``(G, S/G, S/G)``, or ``(G, S/G)`` with ``diagonal``.

    Args:
        calls: the input ``(N, C, *spatial)`` and the geometry of every call of the layer in one forward pass; ``J_b``
            is summed over the calls.
        cotangents: for every call the list of the ``δ_b``, each ``(N, S, *output)``.
        signs: signs of the columns of ``B``, ``(N, B)``, if ``Λ`` has negative eigenvalues.
        diagonal: compute only ``T[s, s]``, which is much less work.
        chunk_size: number of samples per chunk; by default as many as fit into a small memory budget.

    Example:
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> columns = [torch.randn(2, 4, 4, 4).double() for _ in range(5)]
        >>> gauss_newton_block_traces([(x, geometry)], [columns]).shape
        torch.Size([1, 4, 4])
    """
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
        budget = CHUNK_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
        chunk_size = max(1, budget // elements)

    shape = (groups, per_group) if diagonal else (groups, per_group, per_group)
    total = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        # Columns are stacked one chunk at a time, so that the chunk stays in the cache.
        parts = [
            torch.stack([column[chunk] for column in of_call], dim=1)
            .reshape(-1, columns, groups, per_group, size)
            .transpose(1, 2)
            for of_call, size in zip(cotangents, sizes, strict=True)
        ]  # (N, G, B, s, P)
        if use_gram:
            left = parts[0]
            # Columns and filters share a dimension, so that one matrix product per sample and group is enough.
            right = (left.flatten(2, 3) @ patch_gram(inputs[chunk], geometry)).view_as(left)
        else:
            products = [
                patches_times(delta.flatten(2, 3), x[chunk], how) for delta, (x, how) in zip(parts, calls, strict=True)
            ]
            left = right = sum(products[1:], products[0]).unflatten(2, (columns, per_group))  # (N, G, B, s, D)
        if signs is not None:
            left = left * signs[chunk, None, :, None, None]
        if diagonal:
            total += (left * right).sum((0, 2, 4)).double()
        elif per_group <= left.shape[-1]:
            total += (left @ right.mT).sum((0, 2)).double()
        else:  # one product that sums over samples and columns too: separate products would take more memory
            first, second = (factor.permute(1, 3, 0, 2, 4).flatten(2) for factor in (left, right))
            total += (first @ second.mT).double()
    return total
