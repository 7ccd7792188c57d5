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
from lightning_flatness.layers.recording import Convolution

# Largest relative change of relative flatness, by classes that are left out.
TRUNCATION = 1e-6


def closed_form_layer(
    convolution: Convolution,
    tail: TailDerivatives,
    loss: LossDerivatives,
    diagonal: bool,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Block traces of one layer, ``(G, S/G, S/G)``, or their diagonals, ``(G, S/G)``; summed over a batch's samples.

    With ``weights``, classes that do not matter are left out: relative flatness changes by less than
    :data:`TRUNCATION` of itself, which is certified, and the other measures not at all.

    Args:
        convolution: of the layer.
        tail: what follows it.
        loss: derivatives at the logits.
        diagonal: only the diagonals.
        weights: inner products of its filters, and a bound of their spectral norm (:func:`spectral_bound`); None to
            take every class.

    Raises:
        BatchError: the tail is curved and there are no targets.
    """
    curved = curved_part(tail, loss)
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

    if weights is not None:
        gram, gram_norm = weights
        # What is left out is a positive matrix of at most this share of the trace. Its trace times the norm of the Gram
        # matrix bounds the change of relative flatness, which is about the trace times the filters' mean squared norm.
        mean = weight_norm(gram).square() / gram[..., 0].numel()
        tolerance = float(TRUNCATION / 2 * mean / gram_norm)
        part = gauss_newton(tolerance)
        trace = hessian_trace(part)
        total = whole(part)
        if bool(tolerance * trace * gram_norm <= TRUNCATION * relative_flatness(total, gram).abs()):
            return total
    return whole(gauss_newton(0.0))


def curved_part(tail: TailDerivatives, loss: LossDerivatives) -> tuple[Tensor, Tensor] | None:
    """Curvatures of the tail and ``dloss/df``, which make the part beside Gauss-Newton; None if there is none.

    Raises:
        BatchError: it has, and there are no targets.
    """
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
    """An upper bound of the spectral norm of symmetric matrices, by the Schatten norm of order eight.

    Example:
        >>> bool(3 <= spectral_bound(torch.diag(torch.tensor([1.0, 2.0, 3.0]))[None]) < 3.1)
        True
    """
    scale = torch.linalg.matrix_norm(gram).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power((gram / scale).float(), 4)
    bound: Tensor = 1.001 * scale * torch.linalg.matrix_norm(fourth).amax().double() ** 0.25  # float32 is rounded
    return bound
