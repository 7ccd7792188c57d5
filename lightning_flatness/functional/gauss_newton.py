"""Gauss-Newton block traces of any convolution or linear layer, from pulled-back columns of the loss's curvature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.closed_form import CHUNK_ELEMENTS, CHUNK_ELEMENTS_DEFAULT
from lightning_flatness.functional.patches import ConvolutionGeometry, contraction_costs, patch_gram, patches


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
        cotangents: for every call ``δ``, ``(B, N, S, *output)``.
        signs: of the columns, ``(B, N)``, where the loss's Hessian has negative directions.
        diagonal: only ``T[s, s]``, which is much less work.
        chunk_size: samples taken at a time; by default as many as fit a small budget.

    Returns:
        float64 ``(G, S/G, S/G)``, symmetric up to rounding; with ``diagonal``, ``(G, S/G)``.

    Example:
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        >>> delta = torch.randn(5, 2, 4, 4, 4).double()
        >>> gauss_newton_block_traces([(x, geometry)], [delta]).shape
        torch.Size([1, 4, 4])
    """
    columns, samples, filters = cotangents[0].shape[:3]
    inputs, geometry = calls[0]
    groups = geometry.groups
    per_group = filters // groups
    deltas = [delta.reshape(columns, samples, groups, per_group, -1) for delta in cotangents]
    positions = sum(delta.shape[4] for delta in deltas)
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram, by_sum = contraction_costs(positions, patch_length, per_group, columns, diagonal)
    use_gram = len(calls) == 1 and by_gram <= by_sum
    if chunk_size is None:
        length = positions if use_gram else patch_length
        elements = groups * length * (positions + columns * per_group) + columns * filters * positions
        budget = 4 * CHUNK_ELEMENTS.get(inputs.device.type, CHUNK_ELEMENTS_DEFAULT)
        chunk_size = max(1, budget // elements)

    shape = (groups, per_group) if diagonal else (groups, per_group, per_group)
    total = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        delta = torch.cat([part[:, chunk] for part in deltas], dim=4)  # (B, N, G, s, P)
        if use_gram:
            right = delta @ patch_gram(inputs[chunk], geometry)
            left = delta
        else:
            phi = torch.cat([patches(x[chunk], how) for x, how in calls], dim=3)  # (N, G, D, P)
            left = right = delta @ phi.mT
        if signs is not None:
            left = left * signs[:, chunk, None, None, None]
        if diagonal:
            total += torch.einsum("bngsx,bngsx->gs", left, right).double()
            continue
        total += (_filters_first(left) @ _filters_first(right).mT).double()
    return total


def _filters_first(tensor: Tensor) -> Tensor:
    """``(B, N, G, s, X)`` as ``(G, s, B N X)``, for one large product over samples and columns."""
    return tensor.permute(2, 3, 0, 1, 4).flatten(2)
