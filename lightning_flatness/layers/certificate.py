"""Certificates for the layer, the head, and all joined: numbers, never assumptions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError, NotClosedFormError
from lightning_flatness.functional.conditions import holds, same
from lightning_flatness.layers.recording import ConvolutionCall, LayerObservation
from lightning_flatness.layers.tail import ROUNDINGS


def certify_layer(name: str, seen: LayerObservation, known: tuple[Tensor, int] | None = None) -> ConvolutionCall:
    """Certify that the layer's output is one convolution, ``W phi + b``, and return that convolution.

    What counts is the convolution that ran, so layers that pad by themselves or transform their weight are measured
    with respect to the input they really read and the kernel they really apply (:func:`is_own_weight` tells).

    Args:
        name: of the layer.
        seen: what it did.
        known: a kernel that was looked at before, and its version.

    Raises:
        LayerSelectionError: no convolution ran in the layer, several did, or its output was changed afterwards.
        BatchError: the kernel is not finite, or not in float32 or float64; no batch dimension; autocast in the forward.
    """
    kind = type(seen.module).__name__
    if len(seen.calls) != 1:
        raise LayerSelectionError(
            f"Layer '{name}' ({kind}) runs {len(seen.calls)} convolutions or linear maps in its forward; its Hessian "
            "is that of one only if there is one. Choose another layer with layers=."
        )
    call = seen.calls[0]
    unbatched = call.output.ndim < 2 if call.channel_dimension == -1 else call.output.ndim != call.weight.ndim
    if unbatched:
        raise BatchError(f"Layer '{name}' runs on an input without a batch dimension.")
    if call.weight.dtype not in (torch.float32, torch.float64):
        raise BatchError(
            f"Layer '{name}' runs with weights in {call.weight.dtype}, although it was given others: the forward casts "
            "them. A Hessian needs float32 or float64; leave the casting to the Trainer's precision=."
        )
    if call.output.dtype != call.weight.dtype:
        raise BatchError(
            f"Layer '{name}' runs under torch.autocast inside the model's forward (weights {call.weight.dtype}, output "
            f"{call.output.dtype}), which cannot be switched off from outside. Put autocast around the model instead, "
            "as the Trainer's precision= does."
        )
    if not is_known(call.weight, known) and not holds(call.weight.isfinite().all()):
        raise BatchError(f"The weights of layer '{name}' contain NaN or infinity: training has diverged.")
    alias = call.output.data_ptr() == seen.returned.data_ptr() and call.output.stride() == seen.returned.stride()
    if call.output.shape != seen.returned.shape or not (alias or same(call.output, seen.returned)):
        raise LayerSelectionError(
            f"Layer '{name}' ({kind}): its output is not that of its convolution or linear map; its forward or a hook "
            "changes it afterwards. Do that in a module of its own after the layer."
        )
    return call


def is_known(weight: Tensor, known: tuple[Tensor, int] | None) -> bool:
    """Whether a tensor is the very one that is known, unchanged since then."""
    return known is not None and weight is known[0] and weight._version == known[1]


def is_own_weight(call: ConvolutionCall, module: nn.Module) -> bool:
    """Whether the kernel that is applied is the layer's parameter itself, not something computed from it."""
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return own is not None and own.shape == call.weight.shape and torch.equal(own.to(call.weight), call.weight)


def own_weight(module: nn.Module) -> nn.Parameter:
    """The layer's parameter, where it is the kernel that is applied."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def certify_head(
    name: str | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logits: Tensor,
    shift_invariant: bool = True,
) -> Tensor:
    """Certify that what the loss sees equals ``V g + b``.

    A number added to all logits of a sample does not change cross-entropy, so log-softmax outputs pass.

    Args:
        name: of the classifier.
        features: ``g``, ``(N, m)``.
        weight: ``V``, ``(K, m)``.
        bias: ``b``, ``(K,)``, or None.
        output: what the classifier returned.
        logits: what the model returned, ``(N, K)``.
        shift_invariant: whether a number added to all logits of a sample does not change the loss.

    Returns:
        The largest deviation of the logits, relative to the largest logit of the sample: a scalar tensor.

    Raises:
        NotClosedFormError: naming the classifier and whether itself or something after it is not linear.
    """
    eps, own = torch.finfo(output.dtype).eps, output.flatten(1)
    expected, size = features @ weight.T, features.abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    # A dot product of m terms is rounded about sqrt(m) times, here and in the classifier.
    allowed = (4 * features.shape[1] ** 0.5 + 16) * eps * size
    if own.shape != expected.shape or not holds(((own - expected).abs() <= allowed).all()):
        raise NotClosedFormError(
            f"The classifier '{name}' does not return weight @ input + bias (a cosine, normalised or adapted "
            "classifier?), so the closed form does not hold for it."
        )
    if logits.shape != own.shape:
        raise NotClosedFormError(
            f"The model returns {logits.shape[1]} logits and the last linear layer '{name}' {own.shape[1]}: it is not "
            "the classifier, so the closed form does not hold."
        )
    difference = logits.double() - own
    if shift_invariant:
        difference = difference - difference.mean(1, keepdim=True)
    scale = torch.maximum(logits.double().abs().amax(1, keepdim=True), own.abs().amax(1, keepdim=True))
    deviation = (difference.abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).amax()
    if not holds(deviation <= 16 * max(eps, torch.finfo(logits.dtype).eps)):
        rows = logits.double().sum(1)
        softmax = bool((logits >= 0).all()) and bool(((rows - 1).abs() < 1e-3).all())
        cause = (
            "the model returns probabilities; return the logits, the loss applies the softmax itself"
            if softmax
            else "something after it changes them, e.g. a temperature, a soft cap, added priors or masked classes"
        )
        raise NotClosedFormError(
            f"The model's output is not that of its classifier '{name}' (relative deviation {deviation:.1e}): {cause}. "
            "The closed form needs the loss to see the classifier's own output."
        )
    return deviation


def certify_path(name: str, found: Tensor | None, expected: Tensor, squares: Tensor) -> float:
    """Certify layer and all that follows together: a gradient by autograd is the one from the observed cotangents.

    This is what finds a kernel that the model also uses elsewhere (tied weights, a functional call).

    Args:
        name: of the layer.
        found: gradient of a random combination of logits with respect to the kernel, by autograd through the whole
            model; None if there is no way from the kernel to the logits.
        expected: the same, from what was observed at the layer.
        squares: sums of the squares of the terms that ``expected`` is a sum of; where these cancel, so do digits.

    Returns:
        The deviation, relative to the norm of the gradient and of its terms.

    Raises:
        LayerSelectionError: the two gradients differ, or autograd finds no way from the kernel to the logits.
    """
    if found is None and bool(expected.any()):
        raise LayerSelectionError(
            f"Layer '{name}' runs under torch.no_grad() or on detached values, so its Hessian cannot be certified. To "
            "freeze it use requires_grad_(False) on it instead of torch.no_grad() in the forward."
        )
    found = torch.zeros_like(expected) if found is None else found
    scale = torch.stack([expected.norm(), found.norm(), squares.sum().sqrt()]).amax()
    deviation = float((found - expected).norm() / scale) if float(scale) > 0 else 0.0
    if not deviation <= 10 * ROUNDINGS * torch.finfo(expected.dtype).eps:
        raise LayerSelectionError(
            f"Layer '{name}': the logits depend on its kernel in another way too (relative deviation {deviation:.1e}): "
            "the weight is shared with another layer, or used again in the forward. Its Hessian is not that of this "
            "layer alone; choose another layer with layers=."
        )
    return deviation
