"""What autograd's graph of a tensor shows: the operations in it, and whether they can be differentiated twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

# Names and numbers of the functions of a graph, and which comes after which.
Operations = tuple[tuple[Any, ...], ...]


# Functions that move or mix entries as other tensors tell.
MOVING = ("Index", "Gather", "Scatter", "Take", "Sort", "Topk", "Where", "GridSampler", "Convolution", "Mm", "mm", "Mv")


def operations_of(end: Tensor) -> Operations | None:
    """What is done on the way to a tensor; None where names and numbers do not tell.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> operations_of(z.relu().mean(2)) == operations_of((-z).relu().mean(2))
        False
        >>> operations_of(z.relu().mean(2)) == operations_of(z.detach().requires_grad_().relu().mean(2))
        True
    """
    numbers: dict[Any, int] = {}
    found: list[tuple[Any, ...]] = []
    nodes: list[Any] = [end.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in numbers:
            continue
        numbers[node] = len(numbers)
        if isinstance(node, BackwardCFunction) or any(word in node.name() for word in MOVING):
            return None
        following = [after for after, _ in node.next_functions]
        nodes += following
        found.append((node, following))
    return tuple(
        (node.name(), _saved_numbers(node), *(numbers.get(after) for after in following)) for node, following in found
    )


# Functions whose second derivative is zero wherever there is one.
PIECEWISE_LINEAR = frozenset(
    [
        "AccumulateGrad",
        "AdaptiveAvgPool2D",
        "Add",
        "AsStrided",
        "AvgPool2D",
        "AvgPool3D",
        "Cat",
        "Clone",
        "CudnnBatchNorm",
        "Expand",
        "Hardtanh",
        "LeakyRelu",
        "MaxPool2DWithIndices",
        "Mean",
        "NativeBatchNorm",
        "Neg",
        "Permute",
        "Relu",
        "ReshapeAlias",
        "Select",
        "Slice",
        "Squeeze",
        "Sub",
        "Sum",
        "T",
        "Threshold",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    ]
)


def is_piecewise_linear(operations: Operations) -> bool:
    """Whether slopes cannot depend on the output, however it is.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> [is_piecewise_linear(operations_of(f(z).mean(2))) for f in (torch.relu, torch.tanh)]
        [True, False]
    """
    return all(_plain(name) in PIECEWISE_LINEAR for name, *_ in operations)


# Functions that are linear in one of their tensors as long as the others are constants.
LINEAR_IN_ONE = frozenset(["Addmm", "Bmm", "Convolution", "CudnnConvolution", "MkldnnConvolution", "Mm", "Mul", "Mv"])


def cannot_curve(end: Tensor) -> bool:
    """Whether no second derivative of a tensor can be other than zero, by the functions of its graph alone.

    Every function must be known to be linear, or linear in pieces, in what the graph reaches it by. Its backward then
    multiplies by constants and by masks, neither of which has a derivative, whatever the data are.

    Example:
        >>> z, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
        >>> [cannot_curve(f) for f in ((z @ w).relu(), (z @ w).tanh(), z @ z.T, z * z, z * z.detach())]
        [True, False, False, False, True]
    """
    seen: set[Any] = set()
    nodes: list[Any] = [end.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions if after is not None]
        nodes += following
        kind = _plain(node.name())
        linear = kind in PIECEWISE_LINEAR or (kind in LINEAR_IN_ONE and len(following) == 1)
        if not linear or isinstance(node, BackwardCFunction) or getattr(node, "_saved_training", False):
            return False
    return True


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

    Example:
        >>> random_like(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(10 * stream + tensor.ndim)
    # In float64 it would take six times as long.
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)


def differentiable_once(derivatives: Sequence[Tensor]) -> bool:
    """Whether first derivatives hide that a custom function behind it cannot be differentiated again.

    Autograd raises an error only when it passes the mark that such a function leaves, and there is no way past it to
    the layer's output; so the mark itself is looked for.
    """
    seen: set[Any] = set()
    nodes = [derivative.grad_fn for derivative in derivatives]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            return True
        nodes += [following for following, _ in node.next_functions]
    return False
