"""Layers under the Gauss-Newton method: pull columns of the loss's curvature back to all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_flatness.capture.observation import ConvolutionCall, LayerObservation
from lightning_flatness.capture.tail import differentiable_once, random_like
from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.functional import cross_entropy_column, gauss_newton_block_traces

# Elements of pulled-back columns, of all layers, that are kept at a time.
COLUMN_ELEMENTS = 2**25

Calls = Sequence[tuple[LayerObservation, ConvolutionCall]]  # what one layer did, an entry for every time it ran


def gauss_newton_layers(layers: Mapping[str, Calls], logits: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Gauss-Newton block traces of several layers, ``(G, S/G, S/G)`` each, summed over the samples of a batch.

    One backward pass for every column serves all layers, and goes to activations only. Columns are taken in chunks, so
    that memory does not grow with the number of classes.

    Args:
        layers: by name.
        logits: ``(N, K)``, in the graph of the layers' outputs.
        probabilities: ``π``, ``(N, K)``.
    """
    nodes = [observed.output for calls in layers.values() for observed, _ in calls]
    at_a_time = max(1, COLUMN_ELEMENTS // max(1, sum(node.numel() for node in nodes)))
    totals: dict[str, Tensor] = {}
    num_columns = probabilities.shape[1] - 1
    for start in range(0, num_columns, at_a_time):
        pulled = [
            pull_back(logits, nodes, cross_entropy_column(probabilities, index).to(logits.dtype))
            for index in range(start, min(start + at_a_time, num_columns))
        ]
        columns = iter(zip(*pulled, strict=True))
        for name, calls in layers.items():
            cotangents = [
                torch.stack([delta.movedim(call.channel_dimension, 1) for delta in next(columns)]) for _, call in calls
            ]
            part = gauss_newton_block_traces([(call.inputs, call.geometry) for _, call in calls], cotangents)
            totals[name] = totals[name] + part if name in totals else part
    return totals


def pull_back(logits: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Vector-Jacobian products of the logits with one cotangent ``(N, K)``, at all nodes; zeros where none arrives."""
    if not logits.requires_grad:
        return [torch.zeros_like(node) for node in nodes]
    pulled = torch.autograd.grad(
        logits, nodes, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(node) if p is None else p for p, node in zip(pulled, nodes, strict=True)]


def kernel_gradient(calls: Calls, cotangents: Sequence[Tensor]) -> Tensor:
    """Gradient with respect to a layer's kernel, from cotangents at its outputs; the shape of the kernel."""
    total = torch.zeros_like(calls[0][1].weight).detach()
    for (_, call), cotangent in zip(calls, cotangents, strict=True):
        kernel = _as_convolution(call).detach().clone().requires_grad_()
        output = _convolve(call, kernel)
        delta = cotangent.movedim(call.channel_dimension, 1).reshape(output.shape)
        (gradient,) = torch.autograd.grad(output, kernel, delta)
        total = total + gradient.reshape(total.shape)
    return total


def certify_reach(layers: Mapping[str, Calls], logits: Tensor) -> None:
    """Certify that every layer reaches the logits, one row of its output for every sample.

    Raises:
        LayerSelectionError: naming the layer.
    """
    for name, calls in layers.items():
        nodes = [observed.output for observed, _ in calls]
        reached: list[Tensor] = []
        if logits.requires_grad:
            pulled = torch.autograd.grad(logits.sum(), nodes, retain_graph=True, allow_unused=True)
            reached = [node for node, cotangent in zip(nodes, pulled, strict=True) if cotangent is not None]
        if not reached:
            raise LayerSelectionError(
                f"Layer '{name}': the logits do not depend on its output through autograd: the forward detaches it, "
                "runs what follows under torch.no_grad() or as TorchScript, or does not use it. Choose another layer "
                "with layers=."
            )
        rows = {node.shape[0] for node in reached}
        if rows != {len(logits)}:
            raise LayerSelectionError(
                f"Layer '{name}' runs on {max(rows)} rows for {len(logits)} samples (windows or tokens folded into the "
                "batch), so derivatives of single samples cannot be told apart. Choose another layer with layers=."
            )


def certify_samples(layers: Mapping[str, Calls], logits: Tensor) -> None:
    """Certify that no sample's logits depend on another sample's activations.

    Raises:
        LayerSelectionError: naming the layer.
    """
    u = random_like(logits)
    u[::2] = 0
    for name, calls in layers.items():
        for pulled in pull_back(logits, [observed.output for observed, _ in calls], u):
            if bool(pulled[::2].any()):
                raise LayerSelectionError(
                    f"Layer '{name}': after it, the logits of one sample depend on other samples (batch statistics in "
                    "evaluation mode?), so the loss is not a mean over samples. Use running statistics."
                )


def why_not_affine(calls: Calls, logits: Tensor) -> str:
    """Why the logits are not certified to be affine in the layer's kernel; empty if they are.

    Where they are, the Gauss-Newton block is the Hessian's. The second derivative of a random combination of logits,
    along a random kernel, must be exactly zero at every output of the layer. For piecewise-linear networks it is; one
    curved operation makes it non-zero.
    """
    ((observed, call),) = calls
    along = _convolve(call, random_like(_as_convolution(call)))
    shape = observed.output.movedim(call.channel_dimension, 1).shape
    return why_curved(logits, observed.output, along.reshape(shape).movedim(1, call.channel_dimension))


def why_curved(logits: Tensor, node: Tensor, direction: Tensor | None = None) -> str:
    """Why a random combination of logits is not affine in ``node`` along a (random) direction; empty if it is."""
    (delta,) = pull_back(logits, [node], random_like(logits).requires_grad_(), create_graph=True)
    if not delta.requires_grad:
        return ""
    if differentiable_once(delta):
        return "a custom function after it is marked once_differentiable"
    second: Tensor | None
    vector = random_like(node) if direction is None else direction
    try:
        (second,) = torch.autograd.grad(delta, node, vector, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return "an operation after it has no second derivative in torch"
    return "the network is curved after it" if second is not None and bool(second.any()) else ""


def _as_convolution(call: ConvolutionCall) -> Tensor:
    """The kernel with its spatial dimensions, also for a linear layer."""
    return call.weight if call.channel_dimension == 1 else call.weight[..., None]


def _convolve(call: ConvolutionCall, kernel: Tensor) -> Tensor:
    geometry = call.geometry
    return torch.convolution(
        call.inputs,
        kernel,
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        False,
        [0] * len(geometry.stride),
        geometry.groups,
    )
