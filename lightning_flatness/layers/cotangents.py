"""Vector-Jacobian products between logits, the outputs of layers and their kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatness.layers.recording import Convolution, LayerCall
from lightning_flatness.model.graph import random_like

Calls = Mapping[str, Sequence[LayerCall]]  # what layers did in a forward pass, by name


def nodes_of(calls: Calls) -> list[Tensor]:
    """Return the outputs of all calls of all layers, in order."""
    return [call.node for of_layer in calls.values() for call in of_layer]


def pull_back(logits: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Return vector-Jacobian products of the logits and a cotangent ``(N, K)``, at all nodes; zeros if unconnected."""
    pulled = pull_back_where_used(logits, nodes, cotangent, create_graph)
    return [torch.zeros_like(node) if p is None else p for p, node in zip(pulled, nodes, strict=True)]


def pull_back_where_used(
    end: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Return the same products for any tensor ``end``, with None for nodes that it does not depend on."""
    if not end.requires_grad or not nodes:
        return [None] * len(nodes)
    return torch.autograd.grad(
        end, list(nodes), cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )


def kernel_gradient(calls: Sequence[LayerCall], cotangents: Sequence[Tensor], squares: bool = False) -> Tensor:
    """Return the gradient with respect to a layer's kernel, from cotangents at its outputs.

    With ``squares``, return the sum of the squares of its terms.
    """
    total = torch.zeros_like(calls[0].convolution.weight)
    for call, cotangent in zip(calls, cotangents, strict=True):
        convolution, delta = call.convolution, cotangent.movedim(call.convolution.channel_dimension, 1)
        if squares:
            convolution, delta = replace(convolution, inputs=convolution.inputs.square()), delta.square()
        total = total + gradient_of_convolution(convolution, delta)
    return total


def gradient_of_convolution(convolution: Convolution, delta: Tensor) -> Tensor:
    r"""Return ``\sum_n \sum_p δ[s, p] phi[p]``, the gradient at the kernel, from ``δ`` ``(N, S, *output)``."""
    kernel = convolution.weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(convolution, kernel)
        (gradient,) = torch.autograd.grad(output, kernel, delta.reshape(output.shape))
    return gradient


def convolve(convolution: Convolution, kernel: Tensor) -> Tensor:
    """Return the recorded convolution's output for another kernel, without bias; dimension 1 is the channels."""
    inputs, geometry = convolution.inputs, convolution.geometry
    kernel = kernel if convolution.channel_dimension == 1 else kernel[..., None]
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    output_padding = [0] * len(stride)
    return torch.convolution(inputs, kernel, None, stride, padding, dilation, False, output_padding, geometry.groups)


def to_positions(per_channel: Tensor, output: Tensor) -> Tensor:
    """Reshape ``(N, S)`` so that it can multiply a layer's output ``(N, S, *output)``."""
    return per_channel.reshape(*per_channel.shape, *[1] * (output.ndim - 2))


def random_direction(tensor: Tensor, stream: int = 0) -> Tensor:
    """Return an outer product of random vectors; a non-zero linear map is non-zero on almost all such products.

    If one derivative takes directions at several nodes, each needs a stream of its own: else they could cancel.
    """
    product = torch.ones_like(tensor)
    for dimension, size in enumerate(tensor.shape):
        shape = [size if other == dimension else 1 for other in range(tensor.ndim)]
        product = product * random_like(tensor.new_empty(size), 10 * stream + dimension).reshape(shape)
    return product
