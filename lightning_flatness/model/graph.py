"""What autograd's graph of a tensor shows: the operations in it, and whether they can be differentiated twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

# Of every function of a graph: its name, its saved numbers, and the numbers of the functions that follow.
Operations = tuple[tuple[Any, ...], ...]

# Functions that move or mix entries as other tensors say.
MOVING = ("Index", "Gather", "Scatter", "Take", "Sort", "Topk", "Where", "GridSampler", "Convolution", "Mm", "mm", "Mv")


def operations_of(end: Tensor) -> Operations | None:
    """Operations on the way to a tensor; None where their names and numbers do not determine them.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> operations_of(z.relu().mean(2)) == operations_of((-z).relu().mean(2))
        False
        >>> operations_of(z.relu().mean(2)) == operations_of(z.detach().requires_grad_().relu().mean(2))
        True
    """
    nodes = []
    for node in _functions([end]):
        if isinstance(node, BackwardCFunction) or any(word in node.name() for word in MOVING):
            return None
        nodes.append(node)
    numbers = {node: number for number, node in enumerate(nodes)}
    return tuple(
        (node.name(), _saved_numbers(node), *(numbers.get(following) for following, _ in node.next_functions))
        for node in nodes
    )


# Functions whose second derivative is zero wherever there is one.
# fmt: off
PIECEWISE_LINEAR = frozenset([
    "AccumulateGrad", "AdaptiveAvgPool2D", "Add", "AsStrided", "AvgPool2D", "AvgPool3D", "Cat", "Clone",
    "CudnnBatchNorm", "Expand", "Hardtanh", "LeakyRelu", "MaxPool2DWithIndices", "Mean", "NativeBatchNorm", "Neg",
    "Permute", "Relu", "ReshapeAlias", "Select", "Slice", "Squeeze", "Sub", "Sum", "T", "Threshold", "Transpose",
    "UnsafeView", "Unsqueeze", "View",
])
# fmt: on


def is_piecewise_linear(operations: Operations) -> bool:
    """Whether slopes cannot depend on the output, whatever its values."""
    return all(_plain(name) in PIECEWISE_LINEAR for name, *_ in operations)


# Functions that are linear in one of their tensors as long as the others are constants.
LINEAR_IN_ONE = frozenset(["Addmm", "Bmm", "Convolution", "CudnnConvolution", "MkldnnConvolution", "Mm", "Mul", "Mv"])


def cannot_curve(end: Tensor) -> bool:
    """Whether the functions of a tensor's graph alone show that all its second derivatives are zero.

    Every function must be known to be linear, or linear in pieces, in what the graph reaches it by. Its backward then
    multiplies by constants and by masks, neither of which has a derivative, whatever the data are.

    Example:
        >>> z, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
        >>> [cannot_curve(f) for f in ((z @ w).relu(), (z @ w).tanh(), z @ z.T, z * z, z * z.detach())]
        [True, False, False, False, True]
    """
    for node in _functions([end]):
        kind = _plain(node.name())
        num_inputs = sum(following is not None for following, _ in node.next_functions)
        linear = kind in PIECEWISE_LINEAR or (kind in LINEAR_IN_ONE and num_inputs == 1)
        if not linear or isinstance(node, BackwardCFunction) or getattr(node, "_saved_training", False):
            return False
    return True


def _functions(ends: Sequence[Tensor]) -> Iterator[Any]:
    """Functions of the graph that leads to some tensors, each once."""
    visited: set[Any] = set()
    waiting = [end.grad_fn for end in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in visited:
            visited.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _plain(name: str) -> str:
    """The name of a function of a graph without its number and namespace."""
    return re.sub(r"(Backward)?\d*$", "", name.rpartition("::")[2])


def _saved_numbers(node: Any) -> tuple[Any, ...]:
    saved = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
    return tuple(str(value) for value in saved if not isinstance(value, Tensor) and not _holds_tensors(value))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value)


def random_like(tensor: Tensor, stream: int = 0) -> Tensor:
    """Standard normal numbers of the shape, type and device of a tensor, always the same; no generator is touched.

    Those of different streams are independent.
    """
    generator = torch.Generator().manual_seed(10 * stream + tensor.ndim)
    # In float64 it would take six times as long.
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)


@dataclass(frozen=True)
class NoSecondDerivative:
    """Why torch cannot differentiate first derivatives again."""

    marked: bool  # a custom function is marked once_differentiable; else torch lacks the derivative of an operation
    message: str  # which, in torch's words


def second_derivatives(
    derivatives: Sequence[Tensor | None],
    directions: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor | None] | NoSecondDerivative:
    """Gradients of ``sum_i <derivatives[i], directions[i]>`` with respect to the inputs, or why torch has none.

    First derivatives that are None or constant add nothing; an input that they do not depend on has None.
    """
    pairs = [
        (derivative, direction)
        for derivative, direction in zip(derivatives, directions, strict=True)
        if derivative is not None and derivative.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    curved, along = zip(*pairs, strict=True)
    if differentiable_once(curved):
        return NoSecondDerivative(True, "a custom function marked once_differentiable")
    try:
        return torch.autograd.grad(curved, inputs, along, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:  # NotImplementedError is one
        if not any(text in str(error) for text in NOT_DIFFERENTIABLE):
            raise
        return NoSecondDerivative(False, str(error))


# What torch says where an operation has a first derivative and no second.
NOT_DIFFERENTIABLE = ("derivative for", "not implemented", "double backward", "double-backward")


def differentiable_once(derivatives: Sequence[Tensor]) -> bool:
    """Whether the graph of first derivatives has a custom function that cannot be differentiated again.

    Such a function leaves an error node, which ends the graph: autograd raises it only where a path leads to it, and
    passes over in silence that no path leads on to the inputs.
    """
    return any(node.name().endswith("Error") for node in _functions(derivatives))
