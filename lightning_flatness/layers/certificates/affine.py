"""Certify that the logits are affine in a layer's kernel. Then the layer's Gauss-Newton matrix is its Hessian."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lightning_flatness.layers.certificates import ROUNDINGS
from lightning_flatness.layers.cotangents import Calls, nodes_of, pull_back, random_direction
from lightning_flatness.model.graph import NoSecondDerivative, random_like, second_derivatives
from lightning_flatness.results import SAMPLED


class Inexact(Enum):
    """Reasons why a layer is not labelled exact; their texts appear in reports as ``LayerInfo.reason``."""

    CURVED = "the network is curved after it"
    NOT_FINITE = "a second derivative after it is not finite, e.g. of a square root or norm at zero"
    ONCE_DIFFERENTIABLE = "a custom function after it is marked once_differentiable"
    NO_SECOND_DERIVATIVE = "an operation after it has no second derivative in torch"
    ROUNDED = (
        "the network enables autocast itself, so the backward pass of a custom function may round to half precision"
    )
    COMPUTED_KERNEL = "it runs several times with a computed kernel"
    SAMPLED = SAMPLED


def why_not_affine(calls: Calls, logits: Tensor, up_to_shift: bool) -> dict[str, Inexact | None]:
    """Return, for each layer, why the logits are not affine in its kernel; None if they are.

    Requires: every layer in ``calls`` ran once.

    The test differentiates a random combination of logits twice, along random directions at the outputs of the layers.
    This second derivative must be exactly zero. It is zero in a piecewise-linear network. An operation whose second
    derivative is not zero, such as GELU, makes it non-zero.

    One double backward pass serves all layers. At the output of layer ``i`` it returns a sum over all layers ``j`` of
    second derivatives with respect to outputs ``i`` and ``j``. Because the directions are random and independent, the
    sum is zero only if every term is zero. If the sum is not zero, layer ``i`` is tested alone. The logits may still be
    affine in the kernel of this layer, for example if a gate multiplies the outputs of two layers.

    With ``up_to_shift``, the logits need to be affine only up to a number that is added to all logits of a sample. So
    the coefficients of the random combination sum to zero for every sample. This requires a loss that such a number
    does not change, or whose gradient :func:`sums_to_zero`.
    """
    nodes = nodes_of(calls)
    deltas = pull_back(logits, nodes, _combination(logits, up_to_shift), create_graph=True)
    directions = [random_direction(node, 1 + index) for index, node in enumerate(nodes)]
    second = second_derivatives(deltas, directions, nodes, retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return {name: why_curved(logits, node, up_to_shift) for name, node in zip(calls, nodes, strict=True)}
    reasons = {name: _not_zero(derivative) for name, derivative in zip(calls, second, strict=True)}
    if len(nodes) == 1:
        return reasons
    return {
        name: why_curved(logits, node, up_to_shift) if reasons[name] else None
        for name, node in zip(calls, nodes, strict=True)
    }


def why_curved(logits: Tensor, node: Tensor, up_to_shift: bool) -> Inexact | None:
    """Return why the logits are not affine in the tensor ``node``; None if they are.

    The test is the same as in :func:`why_not_affine`. ``node`` is the output or the kernel of one layer.
    """
    deltas = pull_back(logits, [node], _combination(logits, up_to_shift), create_graph=True)
    second = second_derivatives(deltas, [random_direction(node)], [node], retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return Inexact.ONCE_DIFFERENTIABLE if second.marked else Inexact.NO_SECOND_DERIVATIVE
    return _not_zero(second[0])


def sums_to_zero(residual: Tensor | None) -> bool:
    """Return whether ``residual``, ``dloss/df``, sums to zero over the logits of every sample, up to rounding.

    The Hessian has the second derivative of every logit times its entry of ``dloss/df``. If these entries sum to zero,
    a curved number that is added to all logits of a sample adds nothing.
    """
    if residual is None:
        return False
    rounding = ROUNDINGS * torch.finfo(torch.float64).eps * residual.abs().sum(1).max()
    return bool((residual.sum(1).abs() <= rounding).all())


def _not_zero(second: Tensor | None) -> Inexact | None:
    """Return ``CURVED`` or ``NOT_FINITE`` if a second derivative is not zero, else None; ``second=None`` is zero."""
    if second is None or not bool(second.any()):
        return None
    return Inexact.CURVED if bool(second.isfinite().all()) else Inexact.NOT_FINITE


def _combination(logits: Tensor, up_to_shift: bool) -> Tensor:
    """Return the random coefficients ``(N, K)`` of the logits; with ``up_to_shift``, every row sums to zero."""
    u = random_like(logits)
    if up_to_shift:
        # Multiples of one power of two, with so few digits that the sum of a row is exact in every order of summation.
        # So every row sums to zero exactly.
        unit = torch.finfo(u.dtype).eps * 2 ** (16 * u.shape[1]).bit_length()
        u = (u / unit).round() * unit
        u[:, -1] -= u.sum(1)
    return u.requires_grad_()
