"""Is the Gauss-Newton block the Hessian's? It is where the logits are affine in the layer's kernel."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from lightning_flatness.layers.cotangents import Calls, nodes_of, pull_back, random_direction
from lightning_flatness.model.graph import NoSecondDerivative, random_like, second_derivatives
from lightning_flatness.results import SAMPLED


class Inexact(Enum):
    """Why a layer's number is not the Hessian's, or an estimate of it; the value is the text that users read."""

    CURVED = "the network is curved after it"
    ONCE_DIFFERENTIABLE = "a custom function after it is marked once_differentiable"
    NO_SECOND_DERIVATIVE = "an operation after it has no second derivative in torch"
    COMPUTED_KERNEL = "it runs several times with a computed kernel"
    SAMPLED = SAMPLED


def why_not_affine(calls: Calls, logits: Tensor) -> dict[str, Inexact | None]:
    """Why the logits are not certified to be affine in the kernels of layers that ran once; None where they are.

    The second derivative of a random combination of logits, along a random direction, must be exactly zero at every
    output of the layer. For piecewise-linear networks it is; one curved operation makes it non-zero. One double
    backward serves all layers: at the output of a layer it gives the sum of second derivatives with respect to this and
    any other one, and sums of random numbers are zero only if all are. A layer where it is not zero is looked at alone.
    """
    nodes = nodes_of(calls)
    if not nodes:
        return {}
    directions = [random_direction(node, 1 + index) for index, node in enumerate(nodes)]
    deltas = pull_back(logits, nodes, random_like(logits).requires_grad_(), create_graph=True)
    curved = [index for index, delta in enumerate(deltas) if delta.requires_grad]
    if not curved:
        return dict.fromkeys(calls)
    second = _second_derivatives([deltas[i] for i in curved], [directions[i] for i in curved], nodes)
    if isinstance(second, Inexact):
        return {name: why_curved(logits, node) for name, node in zip(calls, nodes, strict=True)}
    suspects = [derivative is not None and bool(derivative.any()) for derivative in second]
    # Among suspects are layers that only other layers interact with, like those before a gate.
    alone = Inexact.CURVED if len(nodes) == 1 else None
    return {
        name: (alone or why_curved(logits, node)) if suspect else None
        for name, node, suspect in zip(calls, nodes, suspects, strict=True)
    }


def why_curved(logits: Tensor, node: Tensor) -> Inexact | None:
    """Why a random combination of logits is not affine in ``node`` along a random direction; None if it is."""
    (delta,) = pull_back(logits, [node], random_like(logits).requires_grad_(), create_graph=True)
    if not delta.requires_grad:
        return None
    second = _second_derivatives([delta], [random_direction(node)], [node])
    if isinstance(second, Inexact):
        return second
    (derivative,) = second
    return Inexact.CURVED if derivative is not None and bool(derivative.any()) else None


def _second_derivatives(
    deltas: Sequence[Tensor], directions: Sequence[Tensor], nodes: Sequence[Tensor]
) -> Sequence[Tensor | None] | Inexact:
    """Derivatives at all nodes of the sum of ``deltas`` along ``directions``, or why torch has none."""
    second = second_derivatives(deltas, directions, nodes, retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        return Inexact.ONCE_DIFFERENTIABLE if second.marked else Inexact.NO_SECOND_DERIVATIVE
    return second
