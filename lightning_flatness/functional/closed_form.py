"""Closed form: block traces of a convolution under an elementwise tail, global pooling and a linear classifier."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_flatness.functional.patches import (
    ConvolutionGeometry,
    patch_gram,
    patch_square_norms,
    patches,
)

# Elements of one chunk's largest intermediates: on a CPU a chunk should stay in the cache, elsewhere be large.
CHUNK_ELEMENTS = {"cpu": 2**20}
CHUNK_ELEMENTS_DEFAULT = 2**26
SAMPLES_IN_CACHE = 8


def closed_form_block_traces(
    inputs: Tensor,
    geometry: ConvolutionGeometry,
    slopes: Tensor,
    head: Tensor,
    probabilities: Tensor,
    curvatures: Tensor | None = None,
    residual: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Block traces of the full Hessian, summed over the samples of a batch (cross-entropy).

    .. math::
        T = \sum_n (V^\top \Lambda V) \circ (a \Gamma a^\top) + \mathrm{diag}\Big(r_s \sum_p a'[s,p]\,\Gamma[p,p]\Big)

    with slopes ``a[s, p] = dg[c(s)] / dz[s, p]``, curvatures ``a' = da / dz``, patch Gram matrix ``Γ``, classifier
    columns ``V[:, s] = weight[:, c(s)]`` and ``r = Vᵀ dloss/df``. Exact when the classifier's input ``g[c(s)]`` is a
    sum of functions of single entries ``z[s, p]``. Source: Taleghani et al. 2026 (arXiv 2603.09016) for ReLU; the
    residual term and the derivation are in ``docs/theory.md``.

    Args:
        inputs: what the convolution reads, ``(N, C, *spatial)``.
        geometry: of the convolution.
        slopes: ``a``, ``(N, S, *output)``.
        head: ``V``, ``(K, S)``.
        probabilities: softmax of the logits, ``(N, K)``.
        curvatures: ``a'``, ``(N, S, *output)``, or None where it vanishes (piecewise-linear tails).
        residual: ``dloss/df``, ``(N, K)``; needed with ``curvatures``.
        chunk_size: samples taken at a time; by default as many as fit a small budget. The result does not depend on it
            beyond rounding, memory does.

    Returns:
        float64 ``(G, S/G, S/G)``, symmetric; the sum over samples, not the mean.

    Raises:
        ValueError: ``curvatures`` without ``residual``.

    Example:
        >>> x, w = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
        >>> z = torch.conv2d(x, w, padding=1)
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> slopes = (z > 0).double() / 36  # ReLU and global average pooling
        >>> V, pi = torch.randn(5, 4).double(), torch.full((2, 5), 0.2).double()
        >>> closed_form_block_traces(x, geometry, slopes, V, pi).shape
        torch.Size([1, 4, 4])
    """
    if curvatures is not None and residual is None:
        raise ValueError("closed_form_block_traces: curvatures need the residual dloss/df, that is, the targets.")
    samples, filters = slopes.shape[:2]
    groups = geometry.groups
    per_group = filters // groups
    slopes = slopes.reshape(samples, groups, per_group, -1)
    positions = slopes.shape[3]
    patch_length = inputs.shape[1] // groups * prod(geometry.kernel_size)
    by_gram = _gram_is_cheaper(positions, patch_length, per_group)
    budget = CHUNK_ELEMENTS.get(inputs.device.type, CHUNK_ELEMENTS_DEFAULT)
    # T is made in strips of rows, from the diagonal to the right: a strip of some samples stays in the cache.
    strip = max(32, min(per_group, budget // (2 * SAMPLES_IN_CACHE * per_group)))
    if chunk_size is None:
        patch_elements = groups * positions * (positions if by_gram else patch_length)
        elements = 2 * groups * strip * per_group + head.shape[0] * filters + patch_elements
        chunk_size = max(1, budget // elements)

    total = torch.zeros(groups, per_group, per_group, dtype=torch.float64, device=inputs.device)
    for start in range(0, samples, chunk_size):
        chunk = slice(start, start + chunk_size)
        left = right = slopes[chunk]
        if by_gram:
            right = left @ patch_gram(inputs[chunk], geometry)
        else:
            left = right = left @ patches(inputs[chunk], geometry).mT  # (N, G, s, D): sum_p a[s, p] phi[p]
        pi = probabilities[chunk]
        mean = pi.to(head.dtype) @ head
        # Centred columns: VᵀΛV = BᵀB without the cancellation of diag(π) - π πᵀ.
        centred = (head - mean[:, None, :]) * pi.sqrt().to(head.dtype)[:, :, None]
        columns = centred.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1)  # (N, G, s, K)
        for row in range(0, per_group, strip):
            rows, rest = slice(row, row + strip), slice(row, None)
            products = columns[:, :, rows] @ columns[:, :, rest].mT
            products *= right[:, :, rows] @ left[:, :, rest].mT
            total[:, rows, rest] += products.sum(0, dtype=torch.float64)
    total = total.triu() + total.triu(1).mT

    if curvatures is not None and residual is not None:
        a_prime = curvatures.reshape(samples, groups, per_group, positions).double()
        norms = patch_square_norms(inputs, geometry).double()
        pulled = (residual.double() @ head.double()).unflatten(1, (groups, per_group))
        diagonal = (pulled * torch.einsum("ngsp,ngp->ngs", a_prime, norms)).sum(0)
        total += torch.diag_embed(diagonal)
    return total


def _gram_is_cheaper(positions: int, patch_length: int, per_group: int) -> bool:
    """Whether ``a Γ aᵀ`` needs fewer multiplications than ``m mᵀ`` with ``m[s] = sum_p a[s, p] phi[p]``."""
    by_gram = positions**2 * (patch_length + per_group) + positions * per_group**2
    by_sum = per_group * patch_length * (positions + per_group)
    return by_gram <= by_sum
