"""Is the Gauss-Newton block the Hessian's? Where the logits are affine in the layer's kernel, and that is certified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.recording import ConvolutionCall, LayerObservation
from lightning_flatness.model.graph import differentiable_once, random_like

Calls = Sequence[tuple[LayerObservation, ConvolutionCall]]  # what one layer did, an entry for every time it ran


def nodes_of(layers: Mapping[str, Calls]) -> list[Tensor]:
    """The outputs of all calls of all layers, in order."""
    return [observed.output for calls in layers.values() for observed, _ in calls]


def pull_back(logits: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Vector-Jacobian products of the logits with one cotangent ``(N, K)``, at all nodes; zeros where none arrives."""
    if not logits.requires_grad:
        return [torch.zeros_like(node) for node in nodes]
    pulled = torch.autograd.grad(
        logits, nodes, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(node) if p is None else p for p, node in zip(pulled, nodes, strict=True)]


def why_out_of_reach(layers: Mapping[str, Calls], logits: Tensor) -> dict[str, str]:
    """Layers that do not reach the logits, or not with one row of their output for every sample, and why."""
    nodes = nodes_of(layers)
    pulled: Sequence[Tensor | None] = [None] * len(nodes)
    if logits.requires_grad:
        pulled = torch.autograd.grad(logits.sum(), nodes, retain_graph=True, allow_unused=True)
    arrived = iter(pulled)
    reasons = {}
    for name, calls in layers.items():
        reached = [observed.output for observed, _ in calls if next(arrived) is not None]
        rows = {node.shape[0] for node in reached}
        if not reached:
            reasons[name] = (
                f"Layer '{name}': the logits do not depend on its output through autograd: the forward detaches it, "
                "runs what follows under torch.no_grad(), as TorchScript or in a checkpoint with use_reentrant=True, or"
                " does not use it. Choose another layer with layers=."
            )
        elif rows != {len(logits)}:
            reasons[name] = (
                f"Layer '{name}' runs on {max(rows)} rows for {len(logits)} samples (windows or tokens folded into the "
                "batch, or a table that all samples share), so derivatives of single samples cannot be told apart. "
                "Choose another layer with layers=."
            )
    return reasons


def certify_samples(layers: Mapping[str, Calls], logits: Tensor, masks: Iterable[Tensor]) -> None:
    """Certify that no sample's logits depend on another sample's activations.

    Args:
        layers: by name.
        logits: in their graph.
        masks: some samples each, ``(N,)``; the logits of these must not depend on the others. Those of
            :func:`~lightning_flatness.functional.separating_masks` leave no pair out.

    Raises:
        LayerSelectionError: naming the layer.
    """
    for mask in masks:
        u = random_like(logits) * mask.to(logits)[:, None]
        pulled = iter(pull_back(logits, nodes_of(layers), u))
        for name, calls in layers.items():
            of_layer = [next(pulled) for _ in calls]
            if any(bool(cotangent[~mask].any()) for cotangent in of_layer):
                raise LayerSelectionError(
                    f"Layer '{name}': after it, the logits of one sample depend on other samples (batch statistics in "
                    "evaluation mode? pairs of samples?), so the loss is not a mean over samples. Use running "
                    "statistics, or a model that takes a pair as one sample."
                )


def why_not_affine(layers: Mapping[str, Calls], logits: Tensor) -> dict[str, str]:
    """Why the logits are not certified to be affine in the kernels of layers that ran once; empty strings if they are.

    Where they are, the Gauss-Newton block is the Hessian's. The second derivative of a random combination of logits,
    along a random direction, must be exactly zero at every output of the layer. For piecewise-linear networks it is;
    one curved operation makes it non-zero. One double backward serves all layers: at the output of a layer it gives the
    sum of second derivatives with respect to this and any other one, and sums of random numbers are zero only if all
    are. A layer where it is not zero is looked at by itself.
    """
    if not layers:
        return {}
    nodes = nodes_of(layers)
    directions = [random_direction(node, 1 + index) for index, node in enumerate(nodes)]
    deltas = pull_back(logits, nodes, random_like(logits).requires_grad_(), create_graph=True)
    curved = [delta for delta in deltas if delta.requires_grad]
    if not curved:
        return dict.fromkeys(layers, "")
    if not differentiable_once(curved):
        along = [vector for vector, delta in zip(directions, deltas, strict=True) if delta.requires_grad]
        second, missing = _second_derivatives(curved, nodes, along)
        if not missing:
            suspects = [name for name, s in zip(layers, second, strict=True) if s is not None and bool(s.any())]
            reasons = dict.fromkeys(layers, "")
            # Among suspects are layers that only other layers interact with, like those before a gate.
            for name, node in zip(layers, nodes, strict=True):
                if name in suspects and len(layers) > 1:
                    reasons[name] = why_curved(logits, node)
                elif name in suspects:
                    reasons[name] = CURVED
            return reasons
    return {name: why_curved(logits, node) for name, node in zip(layers, nodes, strict=True)}


CURVED = "the network is curved after it"


def why_curved(logits: Tensor, node: Tensor) -> str:
    """Why a random combination of logits is not affine in ``node`` along a random direction; empty if it is."""
    (delta,) = pull_back(logits, [node], random_like(logits).requires_grad_(), create_graph=True)
    if not delta.requires_grad:
        return ""
    if differentiable_once([delta]):
        return "a custom function after it is marked once_differentiable"
    (second,), missing = _second_derivatives([delta], [node], [random_direction(node)])
    if missing:
        return "an operation after it has no second derivative in torch"
    return CURVED if second is not None and bool(second.any()) else ""


def _second_derivatives(
    deltas: Sequence[Tensor], nodes: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], bool]:
    """Derivatives of the sum of ``deltas`` along ``directions``, and whether torch has none."""
    try:
        return torch.autograd.grad(deltas, nodes, directions, retain_graph=True, allow_unused=True), False
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return [None] * len(nodes), True


def kernel_gradient(calls: Calls, cotangents: Sequence[Tensor], squares: bool = False) -> Tensor:
    """Gradient with respect to a layer's kernel, from cotangents at its outputs; the shape of the kernel.

    With ``squares``, the sum of the squares of its terms.
    """
    if squares:
        calls = [(observed, replace(call, inputs=call.inputs.square())) for observed, call in calls]
        cotangents = [cotangent.square() for cotangent in cotangents]
    gradients = (
        gradient_of_call(call, cotangent.movedim(call.channel_dimension, 1))
        for (_, call), cotangent in zip(calls, cotangents, strict=True)
    )
    return reduce(torch.add, gradients)


def gradient_of_call(call: ConvolutionCall, delta: Tensor) -> Tensor:
    r"""``\sum_n \sum_p δ[s, p] phi[p]``, the gradient at the kernel of one call, from ``δ``, channels second."""
    kernel = call.weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(call, kernel)
        (gradient,) = torch.autograd.grad(output, kernel, delta.reshape(output.shape))
    return gradient


def convolve(call: ConvolutionCall, kernel: Tensor) -> Tensor:
    """The recorded convolution with another kernel, of the shape of the first, and no bias; channels second."""
    geometry = call.geometry
    return torch.convolution(
        call.inputs,
        kernel if call.channel_dimension == 1 else kernel[..., None],
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        False,
        [0] * len(geometry.stride),
        geometry.groups,
    )


def random_direction(tensor: Tensor, stream: int = 0) -> Tensor:
    """A product of random vectors, one for every dimension; no linear map but zero takes almost all of them to zero.

    Nodes that are looked at together need different streams, or what they add could cancel.
    """
    product = torch.ones_like(tensor)
    for dimension, size in enumerate(tensor.shape):
        shape = [size if other == dimension else 1 for other in range(tensor.ndim)]
        product = product * random_like(tensor.new_empty(size), 10 * stream + dimension).reshape(shape)
    return product
