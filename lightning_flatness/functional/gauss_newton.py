"""Gauss-Newton block traces of any convolution or linear layer, from pulled-back columns of the loss's curvature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.patches import ConvolutionGeometry, contraction_costs, patch_gram, patches

# Elements of one chunk's largest intermediates.
CHUNK_ELEMENTS = {"cpu": 2**22}
ELEMENTS_ELSEWHERE = 2**26


def gauss_newton_block_traces(
    calls: Sequence[tuple[Tensor, ConvolutionGeometry]],
    cotangents: Sequence[Tensor],
    signs: Tensor | None = None,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Block traces of the Gauss-Newton matrix of one layer, summed over samples and over the columns given.

    .. math::
        T = \sum_n \sum_b J_b J_b^\top, \qquad J_b = \sum_p \delta_b[:, p]\, \phi[p]^\top

    where ``δ_b`` is column ``b`` of a factor ``B Bᵀ = Λ`` of the loss's Hessian, pulled back from the logits to the
    layer's output. With all columns this is the Gauss-Newton block; it is the Hessian's where the logits are affine in
    the layer's weight. A linear layer is a convolution of kernel size one over its tokens.

    Args:
        calls: what the layer read, ``(N, C, *spatial)``, and how; more than one entry for a layer that runs several
            times in one forward pass, whose contributions add up inside ``J``.
        cotangents: for every call ``δ``, ``(N, B, S, *output)``.
        signs: of the columns, ``(N, B)``, where the loss's Hessian has negative directions.
        diagonal: only ``T[s, s]``, which is much less work.
        chunk_size: samples taken at a time; by default as many as fit a small budget.

    Returns:
        float64 ``(G, S/G, S/G)``, symmetric up to rounding; with ``diagonal``, ``(G, S/G)``.

    Example:
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> delta = torch.randn(2, 5, 4, 4, 4).double()
        >>> gauss_newton_block_traces([(x, geometry)], [delta]).shape
        torch.Size([1, 4, 4])
    """
    samples, columns, filters = cotangents[0].shape[:3]
    inputs, geometry = calls[0]
    groups = geometry.groups
    per_group = filters // groups
    positions = sum(delta[0, 0, 0].numel() for delta in cotangents)
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram, by_sum = contraction_costs(positions, patch_length, per_group, columns, diagonal)
    use_gram = len(calls) == 1 and by_gram <= by_sum
    if chunk_size is None:
        length = positions if use_gram else patch_length
        elements = groups * length * (positions + columns * per_group) + columns * filters * positions
        budget = CHUNK_ELEMENTS.get(inputs.device.type, ELEMENTS_ELSEWHERE)
        chunk_size = max(1, budget // elements)

    shape = (groups, per_group) if diagonal else (groups, per_group, per_group)
    total = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        parts = [delta[chunk].reshape(-1, columns, groups, per_group, delta[0, 0, 0].numel()) for delta in cotangents]
        delta = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=4)).transpose(1, 2)  # (N, G, B, s, P)
        # Columns go with the filters into one dimension, so that each sample takes part in one product.
        rows = delta.flatten(2, 3)
        if use_gram:
            left = delta
            right = (rows @ patch_gram(inputs[chunk], geometry)).view_as(delta)
            order = (1, 3, 0, 2, 4)
        else:
            phi = [patches(x[chunk], how) for x, how in calls]
            joined = phi[0] if len(phi) == 1 else torch.cat(phi, dim=3)  # (N, G, D, P)
            left = right = (joined @ rows.mT).unflatten(3, (columns, per_group))  # (N, G, D, B, s)
            order = (1, 4, 0, 2, 3)
        if signs is not None:
            of_samples = signs[chunk]
            left = left * (of_samples[:, None, :, None, None] if use_gram else of_samples[:, None, None, :, None])
        # (G, s, all others); for the sum over patches of an ungrouped layer this is a view.
        first, second = (factor.permute(*order).flatten(2) for factor in (left, right))
        total += ((first * second).sum(2) if diagonal else first @ second.mT).double()
    return total
