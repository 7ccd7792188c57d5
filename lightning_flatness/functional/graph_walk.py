"""Find the functions of an autograd graph, and tell whether a function cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

# Parts of torch's error messages for operations that have a first derivative but no second one.
NOT_DIFFERENTIABLE = ("derivative for", "not implemented", "double backward", "double-backward", "differentiate twice")


def says_no_second_derivative(error: Exception) -> bool:
    """Return whether an error of torch says that an operation cannot be differentiated twice."""
    return any(text in str(error) for text in NOT_DIFFERENTIABLE)


def differentiable_once(derivatives: Sequence[Tensor]) -> bool:
    """Return whether the autograd graph of first derivatives contains a custom function marked ``once_differentiable``.

    Such a function leaves an error node, at which the graph ends. Autograd raises an error only if it visits this node.
    If it does not, the gradients behind the node are missing without an error.
    """
    return any(node.name().endswith("Error") for node in functions_of(derivatives))


def functions_of(ends: Sequence[Tensor], starts: Sequence[Tensor] = ()) -> Iterator[Any]:
    """Yield every function (node) of the autograd graph that ends at the tensors ``ends``, each function once.

    The functions that compute ``starts`` are left out, and so is what leads to them only.
    """
    visited: set[Any] = {start.grad_fn for start in starts}
    waiting = [end.grad_fn for end in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in visited:
            visited.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
