"""Certificates for the layer, the head, and the two joined: numbers from the first batch, never assumptions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_flatness.capture.observation import ConvolutionCall, LayerObservation
from lightning_flatness.capture.tail import ROUNDINGS
from lightning_flatness.errors import BatchError, LayerSelectionError, NotClosedFormError


def certify_layer(name: str, seen: LayerObservation) -> ConvolutionCall:
    """Certify that the layer's output is one convolution, ``W phi + b``, and return that convolution.

    What counts is the convolution that ran, so layers that pad by themselves or transform their weight are measured
    with respect to the input they really read and the kernel they really apply (:func:`is_own_weight` tells).

    Raises:
        NotClosedFormError: no convolution ran in the layer, several did, or its output was changed afterwards.
        BatchError: the kernel is not finite, or not in float32 or float64.
    """
    if len(seen.calls) != 1:
        raise NotClosedFormError(
            f"Layer '{name}' ({type(seen.module).__name__}) runs {len(seen.calls)} convolutions in its forward; the "
            "closed form needs one. Choose another layer with layers=."
        )
    call = seen.calls[0]
    if call.output.shape != seen.returned.shape or not torch.equal(call.output, seen.returned):
        raise NotClosedFormError(
            f"Layer '{name}' ({type(seen.module).__name__}): its output is not that of its convolution; its forward or "
            "a hook changes it afterwards. Do that in a module of its own after the convolution."
        )
    if call.output.ndim != call.weight.ndim:
        raise BatchError(f"Layer '{name}' runs on an input without a batch dimension.")
    if call.weight.dtype not in (torch.float32, torch.float64):
        raise BatchError(
            f"Layer '{name}' has weights in {call.weight.dtype}; a Hessian needs float32 or float64. Keep the weights "
            "in float32 (mixed precision does) or measure model.float()."
        )
    if not call.weight.isfinite().all():
        raise BatchError(f"The weights of layer '{name}' contain NaN or infinity: training has diverged.")
    return call


def is_own_weight(call: ConvolutionCall, module: nn.Module) -> bool:
    """Whether the kernel that is applied is the layer's parameter itself, not something computed from it."""
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return own is not None and own.shape == call.weight.shape and torch.equal(own, call.weight)


def certify_head(
    name: str | None, features: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor | None, logits: Tensor
) -> float:
    """Certify that what the loss sees equals ``V g + b``.

    A number added to all logits of a sample does not change cross-entropy, so log-softmax outputs pass.

    Args:
        name: of the classifier; None when the features are the logits.
        features: ``g``, ``(N, m)``.
        weight: ``V``, ``(K, m)``.
        bias: ``b``, ``(K,)``, or None.
        output: what the classifier returned.
        logits: what the model returned, ``(N, K)``.

    Returns:
        The largest deviation, relative to ``|V| |g| + |b|``.

    Raises:
        NotClosedFormError: naming the classifier and whether itself or something after it is not linear.
    """
    offset = torch.zeros(len(weight), dtype=torch.float64, device=weight.device) if bias is None else bias.double()
    expected = features.double() @ weight.double().T + offset
    size = (features.double().abs() @ weight.double().abs().T + offset.abs()).amax(1, keepdim=True)
    size = size.clamp_min(torch.finfo(logits.dtype).tiny)
    tolerance = ROUNDINGS * torch.finfo(logits.dtype).eps
    if output is not None:
        own = output.flatten(1)
        if own.shape != expected.shape or not float(((own - expected).abs() / size).amax()) <= tolerance:
            raise NotClosedFormError(
                f"The classifier '{name}' does not return weight @ input + bias (a cosine, normalised or adapted "
                "classifier?), so the closed form does not hold for it."
            )
    if logits.shape != expected.shape:
        raise NotClosedFormError(
            f"The model returns {logits.shape[1]} logits and the last linear layer '{name}' {expected.shape[1]}: it is "
            "not the classifier, so the closed form does not hold."
        )
    difference = logits.double() - expected
    difference = difference - difference.mean(1, keepdim=True)
    deviation = float((difference.abs() / size).amax())
    if not deviation <= tolerance:
        rows = logits.double().sum(1)
        softmax = bool((logits >= 0).all()) and bool(((rows - 1).abs() < 1e-3).all())
        cause = (
            "the model returns probabilities; return the logits, cross-entropy applies the softmax itself"
            if softmax
            else "something after it changes them, e.g. a temperature, a soft cap, added priors or masked classes"
        )
        raise NotClosedFormError(
            f"The model's output is not that of its classifier '{name}' (relative deviation {deviation:.1e}): {cause}. "
            "The closed form needs the loss to see the classifier's own output."
        )
    return deviation


def certify_path(
    name: str, kernel_gradient: Tensor | None, call: ConvolutionCall, slopes: Tensor, columns: Tensor, cotangent: Tensor
) -> float:
    """Certify layer, tail and head together: the gradient of ``<u, logits>`` by autograd is the one from the slopes.

    This is what finds a kernel that the model also uses elsewhere (tied weights, a functional call).

    Args:
        name: of the layer.
        kernel_gradient: autograd's, ``(S, C/G, *kernel_size)``; None if the logits do not depend on the kernel.
        call: the observed convolution.
        slopes: ``a``, ``(N, S, *output)``.
        columns: ``V[:, c(s)]``, ``(K, S)``.
        cotangent: ``u``, ``(N, K)``, with rows that add up to zero.

    Returns:
        The deviation, relative to the gradient's norm.

    Raises:
        NotClosedFormError: autograd finds no way from the kernel to the logits.
        LayerSelectionError: the two gradients differ.
    """
    kernel = call.weight.detach().clone().requires_grad_()
    geometry = call.geometry
    output = torch.convolution(
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
    pulled = (cotangent @ columns).reshape(*slopes.shape[:2], *[1] * (slopes.ndim - 2)) * slopes
    (expected,) = torch.autograd.grad(output, kernel, pulled)
    if kernel_gradient is None and bool(expected.any()):
        raise NotClosedFormError(
            f"Layer '{name}' runs under torch.no_grad() or on detached values, so its Hessian cannot be certified. To "
            "freeze it use requires_grad_(False) on it instead of torch.no_grad() in the forward."
        )
    found = torch.zeros_like(expected) if kernel_gradient is None else kernel_gradient
    scale = torch.maximum(expected.norm(), found.norm())
    deviation = float((found - expected).norm() / scale) if float(scale) > 0 else 0.0
    if not deviation <= 10 * ROUNDINGS * torch.finfo(kernel.dtype).eps:
        raise LayerSelectionError(
            f"Layer '{name}': the logits depend on its kernel in another way too (relative deviation {deviation:.1e}): "
            "the weight is shared with another layer, or used again in the forward. Its Hessian is not that of one "
            "convolution; choose another layer with layers=."
        )
    return deviation
