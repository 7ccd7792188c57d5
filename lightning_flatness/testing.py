"""Check the numbers of the package against a Hessian that autograd computes, in a simple and slow way.

The Hessian is computed without any code of the package. Use this check to verify the numbers of the package on a small
model of your own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

__all__ = ["assert_matches_oracle", "hessian_rows", "oracle_block_traces"]

LossFunction = Callable[[Tensor, Tensor], Tensor]


def hessian_rows(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    layer: str,
    filters: Sequence[int],
    loss_function: LossFunction = cross_entropy,
) -> Tensor:
    """Compute rows of the Hessian of the mean loss with respect to one layer's weight, by double backward.

    Args:
        model: a model in evaluation mode and in float64.
        batch: a pair of inputs and targets.
        layer: name of a module whose weight ``w`` has ``S`` filters with ``D`` numbers each. The model's own name is
            ``""``.
        filters: indices of the filters that the rows belong to.
        loss_function: maps logits and targets to the mean loss ``L``.

    Returns:
        The rows ``H[i, d, s', d'] = d²L / dw[filters[i], d] dw[s', d']``, of shape ``(len(filters), D, S, D)``.

    Raises:
        AttributeError: the model has no module of this name.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        >>> batch = torch.randn(4, 1, 8).double(), torch.tensor([0, 1, 2, 0])
        >>> hessian_rows(net.double(), batch, "0", filters=[0, 1]).shape
        torch.Size([2, 3, 2, 3])
    """
    inputs, targets = batch
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    kernel = weight.detach().clone().requires_grad_()
    fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = f"{layer}.weight".removeprefix(".")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = loss_function(functional_call(model, {**fixed, name: kernel}, (inputs,)), targets)
        (gradient,) = torch.autograd.grad(loss, kernel, create_graph=True)
        rows = []
        for s in filters:
            for entry in gradient[s].flatten():
                row = None
                if entry.requires_grad:
                    (row,) = torch.autograd.grad(entry, kernel, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(kernel) if row is None else row)
    length = kernel[0].numel()
    return torch.stack(rows).reshape(len(filters), length, len(kernel), length).detach()


def oracle_block_traces(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    layer: str,
    filters: Sequence[int] | None = None,
    loss_function: LossFunction = cross_entropy,
) -> Tensor:
    """Compute the block traces of one layer, one number for every pair of filters.

    The block trace ``T[s, s']`` is the trace of the block of the Hessian with the rows of filter ``s`` and the columns
    of filter ``s'`` (``docs/theory.md``). The rows ``s`` are the given ``filters``, by default all; the columns ``s'``
    are all ``S`` filters of the layer. So the result has the shape ``(len(filters), S)``. For a grouped convolution,
    the result includes pairs of filters from different groups. The arguments are the same as in :func:`hessian_rows`.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        >>> batch = torch.randn(4, 1, 8).double(), torch.tensor([0, 1, 2, 0])
        >>> oracle_block_traces(net.double(), batch, "0").shape
        torch.Size([2, 2])
    """
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    traces = []
    for s in range(len(weight)) if filters is None else filters:
        rows = hessian_rows(model, batch, layer, [s], loss_function)[0]  # (D, S, D)
        traces.append(torch.stack([rows[:, other, :].trace() for other in range(len(weight))]))
    return torch.stack(traces)


def assert_matches_oracle(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    layer: str,
    *,
    filters: Sequence[int] | None = None,
    rtol: float = 1e-10,
    loss_function: LossFunction = cross_entropy,
    **options: Any,
) -> None:
    """Assert that ``measure_flatness`` agrees, for one layer, with the Hessian that autograd computes in float64.

    The check makes one backward pass for every weight of the filters, so choose a small layer or a few ``filters``.

    Args:
        model: any model that ``measure_flatness`` accepts. The check works on a copy of the model. There, a plain
            parameter with the same value replaces a parametrised weight.
        batch: a pair of inputs and targets; the inputs must be one tensor, of floating-point numbers or token ids.
        layer: name of the layer; ``""`` if the model itself is the layer.
        filters: indices of filters. If they are given, the check compares only the block traces of these filters, and
            no measures such as relative flatness.
        rtol: largest allowed error, relative to the largest block trace. For a measure, the error is relative to the
            sum of the absolute values of the terms that add up to the measure.
        loss_function: maps logits and targets to the mean loss. It must be the loss that ``measure_flatness`` uses.
        **options: options of ``measure_flatness``, such as ``loss``.

    Raises:
        AssertionError: the numbers differ. The error is also raised for a layer that applies a kernel other than its
            parameter ``weight``, without a parametrisation; such a layer cannot be checked.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        >>> batch = torch.randn(4, 1, 8).double(), torch.tensor([0, 1, 2, 0])
        >>> assert_matches_oracle(net, batch, layer="0")
    """
    from lightning_flatness import measure_flatness

    model = copy.deepcopy(model).cpu().double().eval()
    inputs, targets = batch[0].cpu(), batch[1].cpu()
    inputs = inputs.double() if inputs.is_floating_point() else inputs  # token ids stay integers
    options = {"tolerance": 0, **options}  # 0: no classes are sampled, so nothing is estimated
    measured = measure_flatness(model, [(inputs, targets)], layers=layer or "all", **options).layers[layer]

    module = model.get_submodule(layer)
    if is_parametrized(module, "weight"):
        # remove_parametrizations deletes a property of the class. The copied module shares its class with the user's
        # module, so it gets a class of its own first.
        kind = type(module)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        remove_parametrizations(module, "weight", leave_parametrized=True)
    elif measured.info.kernel == "effective" or not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise AssertionError(
            f"Layer '{layer}' ({type(module).__name__}) applies a kernel other than its parameter 'weight', but this "
            "check can differentiate only with respect to 'weight'. Check a plain convolution with the same kernel."
        )
    expected = oracle_block_traces(model, (inputs, targets), layer, filters, loss_function)
    groups, per_group, _ = measured.block_traces.shape
    within_groups = torch.block_diag(*torch.ones(groups, per_group, per_group, device="cpu")) == 1
    chosen = list(range(groups * per_group)) if filters is None else list(filters)
    expected = expected.where(within_groups[chosen], 0.0)
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(torch.block_diag(*measured.block_traces)[chosen], expected, rtol=0.0, atol=atol)
    if filters is not None:
        return

    weight = module.weight
    assert isinstance(weight, Tensor)
    gram = weight.detach().flatten(1) @ weight.detach().flatten(1).T
    identity = torch.eye(len(gram), dtype=torch.float64, device="cpu")
    matrices = {
        "hessian_trace": identity,
        "relative_flatness": gram,
        "neuronwise_flatness": gram * identity,
        "layerwise_flatness": gram.trace() * identity,
    }
    for name, matrix in matrices.items():
        terms = matrix * expected
        error = abs(getattr(measured, name) - float(terms.sum()))
        # The error is relative to the sum of absolute values because positive and negative terms may cancel.
        if not error <= rtol * float(terms.abs().sum()):
            raise AssertionError(f"{name} differs by {error} from the value that the Hessian gives.")
