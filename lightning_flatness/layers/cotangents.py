"""Vector-Jacobian products from the logits to the outputs of layers, and from these to the layers' kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatness.layers.convolution import Convolution
from lightning_flatness.layers.recording import LayerCall
from lightning_flatness.model.graph import random_like

Calls = Mapping[str, Sequence[LayerCall]]  # the calls of each layer in a forward pass, keyed by layer name


def nodes_of(calls: Calls) -> list[Tensor]:
    """Return the outputs of all calls of all layers, as tensors of the autograd graph, in the order of ``calls``."""
    return [call.node for of_layer in calls.values() for call in of_layer]


def pull_back(logits: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Return the gradients of ``<cotangent, logits>`` with respect to ``nodes``.

    The nodes are tensors of the autograd graph. The gradient is zero for a node on which the logits do not depend.
    """
    pulled = pull_back_where_used(logits, nodes, cotangent, create_graph)
    return [torch.zeros_like(node) if p is None else p for p, node in zip(pulled, nodes, strict=True)]


def pull_back_where_used(
    end: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Return the gradients of ``<cotangent, end>`` with respect to ``nodes``.

    The gradient is None for a node on which ``end`` does not depend.
    """
    if not end.requires_grad or not nodes:
        return [None] * len(nodes)
    return torch.autograd.grad(
        end, list(nodes), cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )


def kernel_gradient(calls: Sequence[LayerCall], cotangents: Sequence[Tensor], squares: bool = False) -> Tensor:
    """Return the gradient with respect to a layer's kernel, given the cotangents at the layer's outputs.

    The gradient is a sum of products over samples and positions. With ``squares``, the products are squared before they
    are summed.
    """
    total = torch.zeros_like(calls[0].convolution.weight)
    for call, cotangent in zip(calls, cotangents, strict=True):
        convolution, delta = call.convolution, cotangent.movedim(call.convolution.channel_dimension, 1)
        if squares:
            convolution, delta = replace(convolution, inputs=convolution.inputs.square()), delta.square()
        total = total + gradient_of_convolution(convolution, delta)
    return total


def gradient_of_convolution(convolution: Convolution, delta: Tensor) -> Tensor:
    """Return the gradient with respect to a convolution's kernel, given the cotangent ``delta`` at the output.

    ``delta`` is ``δ``, ``(N, S, *output)``. The gradient is ``Σ_n Σ_p δ[s, p] phi[p]``, where ``phi[p]`` is the
    input patch of sample ``n`` at output position ``p``.
    """
    kernel = convolution.weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(convolution, kernel)
        (gradient,) = torch.autograd.grad(output, kernel, delta.reshape(output.shape))
    return gradient


def convolve(convolution: Convolution, kernel: Tensor) -> Tensor:
    """Apply another kernel to the inputs of a recorded convolution, without bias; return ``(N, S, *output)``."""
    inputs, geometry = convolution.inputs, convolution.geometry
    kernel = kernel if convolution.channel_dimension == 1 else kernel[..., None]
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    output_padding = [0] * len(stride)
    return torch.convolution(inputs, kernel, None, stride, padding, dilation, False, output_padding, geometry.groups)


def to_positions(per_channel: Tensor, output: Tensor) -> Tensor:
    """Reshape a tensor ``(N, S)`` so that it can multiply a layer's output ``(N, S, *output)``."""
    return per_channel.reshape(*per_channel.shape, *[1] * (output.ndim - 2))


def random_direction(tensor: Tensor, stream: int = 0) -> Tensor:
    """Return a random tensor that is an outer product of random vectors.

    With probability one, a linear map that sends this tensor to zero is the zero map. Tensors with different ``stream``
    are independent. Use a different ``stream`` for every direction in a sum of derivatives. Otherwise terms of the sum
    could cancel.
    """
    product = torch.ones_like(tensor)
    for dimension, size in enumerate(tensor.shape):
        shape = [size if other == dimension else 1 for other in range(tensor.ndim)]
        product = product * random_like(tensor.new_empty(size), 10 * stream + dimension).reshape(shape)
    return product
