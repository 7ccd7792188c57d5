"""Analyse a tensor's autograd graph: which operations it consists of, and whether these have second derivatives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_flatness.functional.graph_walk import differentiable_once, functions_of, says_no_second_derivative

# The nodes of an autograd graph. The entry of a node has its name, those of its saved values that are not tensors, and
# the indices of the nodes that follow it.
Operations = tuple[tuple[Any, ...], ...]


def has_custom_function(end: Tensor, starts: Sequence[Tensor] = ()) -> bool:
    """Return whether the autograd graph of a tensor, as far as the tensors ``starts``, has a custom function."""
    return any(isinstance(node, BackwardCFunction) for node in functions_of([end], starts))


def operations_of(end: Tensor, samples: int | None = None) -> Operations | None:
    """Return the operations that compute a tensor, or None if they do not show which entries influence each other.

    The result is None if an operation is a custom ``autograd.Function``, or if entries may influence each other on
    some samples only (:func:`may_mix`). If ``samples``, the number of samples in the batch, is given, the result does
    not depend on this number.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> operations_of(z.relu().mean(2)) == operations_of((-z).relu().mean(2))
        False
        >>> operations_of(z.relu().mean(2)) == operations_of(z.detach().requires_grad_().relu().mean(2))
        True
    """
    if has_custom_function(end) or may_mix(end):
        return None
    nodes = list(functions_of([end]))
    numbers = {node: number for number, node in enumerate(nodes)}
    return tuple(
        (node.name(), _saved_numbers(node, samples), *(numbers.get(following) for following, _ in node.next_functions))
        for node in nodes
    )


# Functions with the same derivative on all samples, by the names that autograd gives their nodes.
# fmt: off
LINEAR = frozenset([
    "AccumulateGrad", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "Alias", "AsStrided", "AvgPool2D", "AvgPool3D",
    "Cat", "Clone", "CudnnBatchNorm", "Expand", "Mean", "MiopenBatchNorm", "NativeBatchNorm", "Neg", "Permute",
    "ReshapeAlias", "Select", "Slice", "Squeeze", "Sub", "Sum", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze",
    "View",
])
# Functions that act on every entry, or on every channel of a map, by itself.
BY_CHANNEL = frozenset([
    "Abs", "AccumulateGrad", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
    "Add", "Alias", "Atan", "AvgPool2D", "AvgPool3D", "Celu", "Clamp", "ClampMax", "ClampMin", "Clone", "Cos",
    "CudnnBatchNorm", "Div", "Elu", "Erf", "Exp", "Expm1", "Gelu", "Hardshrink", "Hardsigmoid", "Hardswish",
    "Hardtanh", "LeakyRelu", "Log", "Log1P", "LogSigmoid", "MaxPool2DWithIndices", "MaxPool3DWithIndices",
    "Maximum", "Minimum", "MiopenBatchNorm", "Mish", "Mul", "NativeBatchNorm", "Neg", "Pow", "PreluKernel",
    "Reciprocal", "Relu", "Rsqrt", "Sigmoid", "Silu", "Sin", "Softplus", "Softshrink", "Sqrt", "Squeeze", "Sub",
    "Tanh", "Threshold", "ToCopy", "Unsqueeze",
])
# fmt: on


def may_mix(end: Tensor) -> bool:
    """Return whether entries of different channels may influence each other on some samples only.

    If all functions are linear, channels that influence each other do so on every sample. Functions before a nonlinear
    one must act on every channel by itself. A sum over channels before a ReLU may mix them: the ReLU could be zero on
    all samples seen so far, and the sum would matter on later samples only.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> [may_mix(f) for f in (z.relu().mean(2), z.mean(1), z.mean(2) + (z.mean((1, 2)) - 9).relu()[:, None])]
        [False, False, True]
    """
    waiting: list[tuple[Any, bool]] = [(end.grad_fn, True)]
    visited: set[tuple[Any, bool]] = set()
    while waiting:
        node, linear = waiting.pop()
        if node is None or (node, linear) in visited:
            continue
        visited.add((node, linear))
        kind, following = _plain(node.name()), [function for function, _ in node.next_functions]
        linear = linear and kind in LINEAR
        of_parameter = kind in ARRANGING and all(f is not None and f.name() == LEAF for f in following)
        joins_constants = kind == "Cat" and sum(f is not None for f in following) == 1  # as in a DenseNet
        if not (linear or kind in BY_CHANNEL or of_parameter or joins_constants):
            return True
        waiting += [(function, linear) for function in following]
    return False


LEAF = "torch::autograd::AccumulateGrad"

# Functions whose second derivative is zero wherever it exists, by the names that autograd gives their nodes.
# fmt: off
PIECEWISE_LINEAR = frozenset([
    "AccumulateGrad", "AdaptiveAvgPool2D", "Add", "AsStrided", "AvgPool2D", "AvgPool3D", "Cat", "Clone",
    "CudnnBatchNorm", "Expand", "Hardtanh", "LeakyRelu", "MaxPool2DWithIndices", "Mean", "NativeBatchNorm", "Neg",
    "Permute", "Relu", "ReshapeAlias", "Select", "Slice", "Squeeze", "Sub", "Sum", "T", "Threshold", "Transpose",
    "UnsafeView", "Unsqueeze", "View",
])
# fmt: on


def is_piecewise_linear(operations: Operations) -> bool:
    """Return whether all operations are piecewise linear."""
    return all(_plain(name) in PIECEWISE_LINEAR for name, *_ in operations)


# Functions that are linear in one of their inputs if all other inputs are constants.
LINEAR_IN_ONE = frozenset(["Addmm", "Bmm", "Convolution", "CudnnConvolution", "MkldnnConvolution", "Mm", "Mul", "Mv"])


def cannot_curve(end: Tensor) -> bool:
    """Return whether the functions in a tensor's graph imply that all second derivatives of the tensor are zero.

    Every function in the graph must be known to be linear or piecewise linear in those of its inputs that are in the
    graph. Then the backward pass only multiplies by constants and masks, whose derivatives are zero for any data.

    Example:
        >>> z, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
        >>> [cannot_curve(f) for f in ((z @ w).relu(), (z @ w).tanh(), z @ z.T, z * z, z * z.detach())]
        [True, False, False, False, True]
    """
    for node in functions_of([end]):
        kind = _plain(node.name())
        num_inputs = sum(following is not None for following, _ in node.next_functions)
        linear = kind in PIECEWISE_LINEAR or (kind in LINEAR_IN_ONE and num_inputs == 1)
        if not linear or isinstance(node, BackwardCFunction) or getattr(node, "_saved_training", False):
            return False
    return True


# Functions that only arrange or convert the entries of one tensor.
ARRANGING = frozenset(["Alias", "Clone", "Permute", "Select", "Slice", "Squeeze", "T", "ToCopy", "Unsqueeze", "View"])


def ends_with_sigmoid(end: Tensor) -> bool:
    """Return whether a tensor is the output of a sigmoid, possibly reshaped, sliced or converted to another dtype.

    Example:
        >>> z = torch.randn(2, 3, requires_grad=True)
        >>> ends_with_sigmoid(z.sigmoid()[:, 0]), ends_with_sigmoid(z.sigmoid() * 2)
        (True, False)
    """
    node: Any = end.grad_fn
    while node is not None and _plain(node.name()) in ARRANGING:
        node = node.next_functions[0][0]
    return node is not None and _plain(node.name()) == "Sigmoid"


def _plain(name: str) -> str:
    """Return the name of a node without its namespace, ``Backward`` and number, e.g. ``Relu`` for ``ReluBackward0``."""
    return re.sub(r"(Backward)?\d*$", "", name.rpartition("::")[2])


def _saved_numbers(node: Any, samples: int | None) -> tuple[Any, ...]:
    saved = {name: getattr(node, name) for name in dir(node) if name.startswith("_saved_")}
    return tuple(
        str(value if samples is None else _of_one_sample(name, value, samples))
        for name, value in saved.items()
        if not isinstance(value, Tensor) and not _holds_tensors(value)
    )


def _of_one_sample(name: str, value: Any, samples: int) -> Any:
    """Return a value that a node has saved, without the number of samples in it.

    If a shape begins with the number of samples, drop this entry. If a value is the number of entries of a tensor,
    divide it by the number of samples.
    """
    if name.endswith("sizes") and isinstance(value, tuple) and value[:1] == (samples,):
        return value[1:]
    return value // samples if name.endswith("numel") else value


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value)


def random_like(tensor: Tensor, stream: int = 0) -> Tensor:
    """Return standard normal numbers in the shape, dtype and device of a tensor, without using global generators.

    The numbers are the same in every call. Different values of ``stream`` give independent numbers.
    """
    generator = torch.Generator().manual_seed(10 * stream + tensor.ndim)
    # Drawing in float64 would take six times as long.
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)


@dataclass(frozen=True)
class NoSecondDerivative:
    """The reason why torch cannot differentiate some first derivatives again."""

    marked: bool  # True: a custom function is marked once_differentiable; False: torch lacks a derivative
    message: str  # which operation, in torch's words


def second_derivatives(
    derivatives: Sequence[Tensor | None],
    directions: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> Sequence[Tensor | None] | NoSecondDerivative:
    """Return the gradients of ``sum_i <derivatives[i], directions[i]>`` at the inputs.

    If torch cannot differentiate an operation twice, return the reason instead.

    ``derivatives`` are first derivatives; those that are None or constant are skipped. The gradient is None for an
    input on which the sum does not depend.
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
        if not says_no_second_derivative(error):
            raise
        return NoSecondDerivative(False, str(error))
