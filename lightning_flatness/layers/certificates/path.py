"""Certificate 4, the path: the logits depend on a layer's kernel only through the outputs of the layer.

:func:`is_output` tells whether the output of a layer is the logits themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.certificates import ROUNDINGS
from lightning_flatness.layers.cotangents import kernel_gradient, pull_back
from lightning_flatness.layers.recording import LayerCall
from lightning_flatness.model.graph import random_like


def certify_path(gradient: Tensor | None, calls: Sequence[LayerCall], cotangents: Sequence[Tensor]) -> float:
    """Certify that a kernel's gradient through the whole model is the gradient through the layer's outputs.

    Args:
        gradient: the gradient of a random combination of logits with respect to the kernel, by autograd through the
            whole model; None if the logits do not depend on the kernel.
        calls: the calls of the layer.
        cotangents: the gradients of the same combination with respect to the layer's outputs. They determine the
            gradient that the kernel has if the model uses the kernel in this layer only.

    Returns:
        The norm of the difference of the two gradients, divided by the larger of their norms. A gradient is a sum over
        samples and positions, whose terms may cancel. So the divisor is at least the root of the sum of their squares.

    Raises:
        LayerSelectionError: the two gradients differ, because the model also uses the kernel outside the layer (tied
            weights, a functional call). Or the logits depend on the layer's outputs, but autograd finds no gradient
            with respect to the kernel.
    """
    expected = kernel_gradient(calls, cotangents)
    if gradient is None and bool(expected.any()):
        raise LayerSelectionError(
            "it runs under torch.no_grad() or on detached values, so its Hessian cannot be certified. To freeze the "
            "layer, call requires_grad_(False) on it instead of using torch.no_grad() in the forward."
        )
    gradient = torch.zeros_like(expected) if gradient is None else gradient
    terms = kernel_gradient(calls, cotangents, squares=True).sum().sqrt()
    scale = float(torch.stack([expected.norm(), gradient.norm(), terms]).amax())
    deviation = float((gradient - expected).norm() / scale) if scale > 0 else 0.0
    if not deviation <= 10 * ROUNDINGS * torch.finfo(expected.dtype).eps:
        raise LayerSelectionError(
            f"the logits also depend on its kernel in another way (relative deviation {deviation:.1e}): the weight is "
            "shared with another layer, or used again in the forward. So the Hessian is not that of this layer alone. "
            "Choose another layer with layers=."
        )
    return deviation


def is_output(calls: Sequence[LayerCall], logits: Tensor, shift_invariant: bool) -> bool:
    """Return whether the Jacobian of the logits with respect to the layer's output is the identity.

    The result is False unless the layer runs once, as a linear map of one vector for every sample, like a classifier.
    The vector-Jacobian product of the logits with a random ``u`` ``(N, K)`` must be ``u``. ``shift_invariant`` says
    that the loss stays the same if a number is added to all logits of a sample. Then ``u`` sums to zero over the
    classes, and log-softmax outputs pass.
    """
    node, convolution = calls[0].node, calls[0].convolution
    geometry, weight = convolution.geometry, convolution.weight.flatten(1)
    is_plain = geometry.groups == 1 and not any(geometry.padding)
    is_linear = is_plain and weight.shape == (logits.shape[1], convolution.inputs.flatten(1).shape[1])
    if len(calls) > 1 or not is_linear or node.flatten(1).shape != logits.shape:
        return False
    u = random_like(logits)
    if shift_invariant:
        u = u - u.mean(1, keepdim=True)
    (pulled,) = pull_back(logits, [node], u)
    # A log-softmax adds up K numbers. A larger tolerance would let a temperature of 1.001 pass.
    roundings = 4 * logits.shape[1] ** 0.5 + 16
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (node, logits))
    return bool((pulled.flatten(1) - u).abs().amax() <= roundings * eps * u.abs().amax())
