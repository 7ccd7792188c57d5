"""Whether the Gauss-Newton matrix of a layer is its Hessian: it is if the logits are affine in its kernel."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lightning_flatness.layers.cotangents import Calls, nodes_of, pull_back, random_direction
from lightning_flatness.model.graph import NoSecondDerivative, random_like, second_derivatives
from lightning_flatness.results import SAMPLED


class Inexact(Enum):
    """Reasons why a layer's numbers are not, or only estimate, those of the Hessian; users read the values."""

    CURVED = "the network is curved after it"
    NOT_FINITE = "a second derivative after it is not finite (a square root or norm at zero?)"
    ONCE_DIFFERENTIABLE = "a custom function after it is marked once_differentiable"
    NO_SECOND_DERIVATIVE = "an operation after it has no second derivative in torch"
    COMPUTED_KERNEL = "it runs several times with a computed kernel"
    SAMPLED = SAMPLED


def why_not_affine(calls: Calls, logits: Tensor, shift_invariant: bool) -> dict[str, Inexact | None]:
    """Return why the logits are not affine in the kernel, for each layer that ran once; None if they are.

    With ``shift_invariant``, they need be so only up to a number added to all logits of a sample, which such a loss
    does not see: its derivatives sum to zero, and so do the entries of the combinations.

    The second derivative of a random combination of logits, along a random direction, must be exactly zero at every
    output of the layer. It is zero in piecewise-linear networks; one curved operation makes it non-zero. One double
    backward pass serves all layers: at the output of a layer it gives the sum of the second derivatives with respect to
    this output and every other one. A sum of random numbers is zero only if all of them are. If the sum is not zero,
    the layer is tested alone, since its output may only interact with other layers, as before a gate.
    """
    nodes = nodes_of(calls)
    deltas = pull_back(logits, nodes, _combination(logits, shift_invariant), create_graph=True)
    directions = [random_direction(node, 1 + index) for index, node in enumerate(nodes)]
    second = second_derivatives(deltas, directions, nodes, retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return {name: why_curved(logits, node, shift_invariant) for name, node in zip(calls, nodes, strict=True)}
    reasons = {name: _not_zero(derivative) for name, derivative in zip(calls, second, strict=True)}
    if len(nodes) == 1:
        return reasons
    return {
        name: why_curved(logits, node, shift_invariant) if reasons[name] else None
        for name, node in zip(calls, nodes, strict=True)
    }


def why_curved(logits: Tensor, node: Tensor, shift_invariant: bool) -> Inexact | None:
    """Return why a random combination of logits is not affine in ``node`` along a random direction; None if it is."""
    deltas = pull_back(logits, [node], _combination(logits, shift_invariant), create_graph=True)
    second = second_derivatives(deltas, [random_direction(node)], [node], retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return Inexact.ONCE_DIFFERENTIABLE if second.marked else Inexact.NO_SECOND_DERIVATIVE
    return _not_zero(second[0])


def _not_zero(second: Tensor | None) -> Inexact | None:
    if second is None or not bool(second.any()):
        return None
    return Inexact.CURVED if bool(second.isfinite().all()) else Inexact.NOT_FINITE


def _combination(logits: Tensor, shift_invariant: bool) -> Tensor:
    """Return the random cotangent of a combination of logits; with ``shift_invariant``, its rows sum to zero."""
    u = random_like(logits)
    if shift_invariant:
        # Multiples of a power of two, of so few digits that their sums are not rounded, in whatever order: the rows
        # sum to zero exactly.
        unit = torch.finfo(u.dtype).eps * 2 ** (16 * u.shape[1]).bit_length()
        u = (u / unit).round() * unit
        u[:, -1] -= u.sum(1)
    return u.requires_grad_()
