"""Block traces ``T = Σ_n ‖g_n‖² Λ_n`` and flatness measures with respect to the weight ``W`` of the classifier.

``g_n`` is the input of the classifier for sample ``n``, and ``Λ_n`` the Hessian of the sample's loss with respect to
its logits. The logits are affine in ``W``, so no derivative of the network is needed (``docs/theory.md``, "The
classifier").
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.functional.autograd_curvature import Curvature
from lightning_flatness.functional.curvature import ClassCurvature
from lightning_flatness.functional.weighting import (
    CHANNELWISE,
    NORMALIZED,
    RELATIVE,
    TRACE,
    Contraction,
    Weighting,
    no_values,
)


def classifier_block_traces(features: Tensor, curvature: Curvature) -> Tensor:
    """Compute the block traces ``T = Σ_n ‖g_n‖² Λ_n`` of the Hessian with respect to the classifier's weight ``W``.

    The result is float64 ``(1, K, K)``. It is exact because the logits are affine in ``W``.

    Args:
        features: ``g``, the inputs of the classifier, ``(N, m)``.
        curvature: ``Λ`` of every sample, at the logits ``g Wᵀ + b``.

    Source:
        Petzka et al. 2021 (arXiv 2001.00939), Definition 3, compute the same numbers from the whole Hessian.

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


def classifier_contraction(
    features: Tensor, kernel: Tensor, curvature: ClassCurvature, weighting: Weighting, diagonal: bool = False
) -> Contraction:
    """Compute block traces like :func:`classifier_block_traces`, and the measures of every sample.

    For one sample, let ``d`` be the diagonal of ``WᵀΛW``, and ``σ_c`` the standard deviation of feature ``c``. The
    sample has relative flatness ``‖g‖² Σ_c d_c``, normalised relative flatness ``‖g / σ‖² Σ_c σ_c² d_c`` and
    channel-wise flatness ``Σ_c g_c² d_c``. The time grows with ``N K m`` for ``m`` features.

    Args:
        features: the inputs ``g`` of the classifier, ``(N, m)``.
        kernel: the classifier's weight ``W``, ``(K, m)``.
        curvature: ``Λ`` of all ``N`` samples.
        weighting: ``σ``, and the matrices of the measures; a measure without its matrix is not computed.
        diagonal: compute only the diagonal of the block traces.
    """
    g, kernel = features.double(), kernel.detach().double()
    norms = g.square().sum(1)
    total = (norms @ curvature.diagonals() if diagonal else curvature.summed(norms))[None]
    values = no_values(len(g), g.device)
    values[:, TRACE] = norms * curvature.traces()
    if any(matrix is not None for matrix in (weighting.gram, weighting.normalized, weighting.kernel)):
        spread = curvature.diagonal(kernel)  # d, (N, m)
        if weighting.gram is not None:
            values[:, RELATIVE] = norms * spread.sum(1)
        if weighting.normalized is not None and weighting.deviations is not None:
            scaled = (g * weighting.inverse).square().sum(1)
            values[:, NORMALIZED] = scaled * (spread @ weighting.deviations.square())
        if weighting.kernel is not None:
            values[:, CHANNELWISE] = (g.square() * spread).sum(1)
    return Contraction(total, values, norms.new_zeros(()))
