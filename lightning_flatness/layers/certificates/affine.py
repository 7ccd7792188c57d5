"""Whether the Gauss-Newton matrix of a layer is its Hessian: it is if the logits are affine in its kernel."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from lightning_flatness.layers.cotangents import Calls, nodes_of, pull_back, random_direction
from lightning_flatness.model.graph import NoSecondDerivative, random_like, second_derivatives
from lightning_flatness.results import SAMPLED


class Inexact(Enum):
    """Reasons why a layer's numbers are not, or only estimate, those of the Hessian; users read the values."""

    CURVED = "the network is curved after it"
    ONCE_DIFFERENTIABLE = "a custom function after it is marked once_differentiable"
    NO_SECOND_DERIVATIVE = "an operation after it has no second derivative in torch"
    COMPUTED_KERNEL = "it runs several times with a computed kernel"
    SAMPLED = SAMPLED


def why_not_affine(calls: Calls, logits: Tensor) -> dict[str, Inexact | None]:
    """Return why the logits are not affine in the kernel, for each layer that ran once; None if they are.

    The second derivative of a random combination of logits, along a random direction, must be exactly zero at every
    output of the layer. It is zero in piecewise-linear networks; one curved operation makes it non-zero. One double
    backward pass serves all layers: at the output of a layer it gives the sum of the second derivatives with respect to
    this output and every other one. A sum of random numbers is zero only if all of them are. If the sum is not zero,
    the layer is tested alone, since its output may only interact with other layers, as before a gate.
    """
    nodes = nodes_of(calls)
    deltas = pull_back(logits, nodes, random_like(logits).requires_grad_(), create_graph=True)
    directions = [random_direction(node, 1 + index) for index, node in enumerate(nodes)]
    second = second_derivatives(deltas, directions, nodes, retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return {name: why_curved(logits, node) for name, node in zip(calls, nodes, strict=True)}
    alone = Inexact.CURVED if len(nodes) == 1 else None
    return {
        name: (alone or why_curved(logits, node)) if derivative is not None and bool(derivative.any()) else None
        for name, node, derivative in zip(calls, nodes, second, strict=True)
    }


def why_curved(logits: Tensor, node: Tensor) -> Inexact | None:
    """Return why a random combination of logits is not affine in ``node`` along a random direction; None if it is."""
    deltas = pull_back(logits, [node], random_like(logits).requires_grad_(), create_graph=True)
    second = second_derivatives(deltas, [random_direction(node)], [node], retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return Inexact.ONCE_DIFFERENTIABLE if second.marked else Inexact.NO_SECOND_DERIVATIVE
    (derivative,) = second
    return Inexact.CURVED if derivative is not None and bool(derivative.any()) else None
