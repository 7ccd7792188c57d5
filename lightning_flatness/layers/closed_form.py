"""Block traces of one layer under the closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import (
    LossDerivatives,
    closed_form_block_traces,
    closed_form_residual,
    hessian_trace,
    relative_flatness,
    weight_norm,
)
from lightning_flatness.layers.certificates.tail import TailDerivatives
from lightning_flatness.layers.certified import Certified, CertifiedPass
from lightning_flatness.layers.estimates import BlockTraces

# The largest relative change of relative flatness that leaving out classes may cause.
TRUNCATION = 1e-6


def closed_form_layer(name: str, certified: CertifiedPass, known: Certified, diagonal: bool) -> BlockTraces:
    """Return block traces of one layer, or their diagonals, summed over the samples of a pass.

    With many classes (:attr:`CertifiedLayer.gram_norm`), classes of negligible weight are left out. The relative change
    of relative flatness is certified to be less than :data:`TRUNCATION`; the other measures do not change.
    """
    convolution, tail, loss = certified.calls[name][0].convolution, certified.tails[name], certified.loss
    layer, curved = known.layers[name], curved_part(tail, loss)
    of_filters = None
    if curved is not None:
        of_filters = closed_form_residual(convolution.inputs, convolution.geometry, curved[0], tail.columns, curved[1])

    def gauss_newton(tolerance: float) -> Tensor:
        with torch.no_grad():
            return closed_form_block_traces(
                convolution.inputs, convolution.geometry, tail.slopes, tail.columns, loss.curvature, tolerance, diagonal
            )

    def whole(part: Tensor) -> Tensor:
        if of_filters is not None:
            (part if diagonal else part.diagonal(dim1=1, dim2=2)).add_(of_filters)
        return part

    if layer.gram_norm is not None:
        gram, gram_norm = layer.gram.whole(), layer.gram_norm
        # What is left out is a positive matrix of at most this share of the trace. Its trace times the norm of the Gram
        # matrix bounds the change of relative flatness, which is about the trace times the filters' mean squared norm.
        mean = weight_norm(gram).square() / gram[..., 0].numel()
        tolerance = float(TRUNCATION / 2 * mean / gram_norm)
        part = gauss_newton(tolerance)
        trace = hessian_trace(part)
        total = whole(part)
        if bool(tolerance * trace * gram_norm <= TRUNCATION * relative_flatness(total, gram).abs()):
            return BlockTraces(total)
    return BlockTraces(whole(gauss_newton(0.0)))


def curved_part(tail: TailDerivatives, loss: LossDerivatives) -> tuple[Tensor, Tensor] | None:
    """Return curvatures of the tail and ``dloss/df``; None if the Hessian is the Gauss-Newton matrix."""
    if tail.curvatures is None:
        return None
    if loss.residual is not None:
        return tail.curvatures, loss.residual
    if bool(tail.curvatures.any()):
        raise BatchError(
            "the activation after it is curved, so its Hessian depends on the targets, and this batch has none. Give "
            "batches of (inputs, targets)."
        )
    return None


def spectral_bound(gram: Tensor) -> Tensor:
    """Return an upper bound of the spectral norm of symmetric matrices: their Schatten norm of order eight."""
    scale = torch.linalg.matrix_norm(gram).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power((gram / scale).float(), 4)
    bound: Tensor = 1.001 * scale * torch.linalg.matrix_norm(fourth).amax().double() ** 0.25  # float32 is rounded
    return bound
