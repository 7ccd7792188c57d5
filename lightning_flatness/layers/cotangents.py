"""Vector-Jacobian products between logits, the outputs of layers and their kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lightning_flatness.layers.recording import Convolution, LayerCall
from lightning_flatness.model.graph import random_like

Calls = Mapping[str, Sequence[LayerCall]]  # what layers did in a forward pass, by name


def nodes_of(calls: Calls) -> list[Tensor]:
    """The outputs of all calls of all layers, in order."""
    return [call.node for of_layer in calls.values() for call in of_layer]


def pull_back(logits: Tensor, nodes: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Vector-Jacobian products of the logits with one cotangent ``(N, K)``, at all nodes; zeros where none arrives."""
    if not logits.requires_grad:
        return [torch.zeros_like(node) for node in nodes]
    pulled = torch.autograd.grad(
        logits, nodes, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(node) if p is None else p for p, node in zip(pulled, nodes, strict=True)]


def kernel_gradient(calls: Sequence[LayerCall], cotangents: Sequence[Tensor], squares: bool = False) -> Tensor:
    """Gradient with respect to a layer's kernel, from cotangents at its outputs; the shape of the kernel.

    With ``squares``, the sum of the squares of its terms.
    """
    convolutions = [call.convolution for call in calls]
    if squares:
        convolutions = [replace(convolution, inputs=convolution.inputs.square()) for convolution in convolutions]
        cotangents = [cotangent.square() for cotangent in cotangents]
    return reduce(
        torch.add,
        (
            gradient_of_convolution(convolution, cotangent.movedim(convolution.channel_dimension, 1))
            for convolution, cotangent in zip(convolutions, cotangents, strict=True)
        ),
    )


def gradient_of_convolution(convolution: Convolution, delta: Tensor) -> Tensor:
    r"""``\sum_n \sum_p δ[s, p] phi[p]``, the gradient at the kernel, from ``δ``, channels second."""
    kernel = convolution.weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(convolution, kernel)
        (gradient,) = torch.autograd.grad(output, kernel, delta.reshape(output.shape))
    return gradient


def convolve(convolution: Convolution, kernel: Tensor) -> Tensor:
    """The recorded convolution with another kernel, of the shape of the first, and no bias; channels second."""
    geometry = convolution.geometry
    return torch.convolution(
        convolution.inputs,
        kernel if convolution.channel_dimension == 1 else kernel[..., None],
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        False,
        [0] * len(geometry.stride),
        geometry.groups,
    )


def random_direction(tensor: Tensor, stream: int = 0) -> Tensor:
    """A product of random vectors, one for every dimension: a non-zero linear map is non-zero on almost all of them.

    Nodes that are looked at together need different streams, or what they add could cancel.
    """
    product = torch.ones_like(tensor)
    for dimension, size in enumerate(tensor.shape):
        shape = [size if other == dimension else 1 for other in range(tensor.ndim)]
        product = product * random_like(tensor.new_empty(size), 10 * stream + dimension).reshape(shape)
    return product
