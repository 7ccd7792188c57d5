"""Certificate 3, the head: the logits are ``V g + b``, an affine map of the classifier's input ``g``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatness.errors import NotClosedFormError
from lightning_flatness.functional.conditions import holds
from lightning_flatness.layers.recording import Pass
from lightning_flatness.model.logits import are_probabilities


@dataclass(frozen=True)
class Head:
    """The certified affine map from the classifier's input ``g`` to the logits, in one forward pass."""

    features: Tensor  # the classifier's input g, (N, m), connected to the layers in the autograd graph
    weight: Tensor  # the classifier's weight V, (K, m)
    deviation: Tensor  # largest relative difference of a logit and the classifier's output; a scalar
    shift_invariant: bool  # whether the loss stays the same if a number is added to all logits of a sample
    logits: Tensor  # (N, K): the model's logits; in half precision, V g + b computed in float32


def certify_head(classifier: nn.Module | None, recorded: Pass, shift_invariant: bool) -> Head:
    """Certify that the logits are ``V g + b``, and return this map.

    Here ``g`` is the classifier's input, one vector for every sample. ``V`` and ``b`` are the classifier's weight and
    bias. Without a classifier, ``g`` are the logits themselves, and ``V`` is the identity. With ``shift_invariant``,
    the loss stays the same if a number is added to all logits of a sample. Such a number may then be added to
    ``V g + b``, so log-softmax outputs pass.

    Raises:
        NotClosedFormError: the logits are computed in another way.
    """
    logits = recorded.logits
    if classifier is None:
        in_full = logits.detach() if recorded.half is None else logits.detach().float()
        identity = torch.eye(logits.shape[1], dtype=in_full.dtype, device=logits.device)
        return Head(logits, identity, identity.new_zeros(()), shift_invariant, in_full)
    features, output = recorded.features[0] if len(recorded.features) == 1 else None, recorded.classifier_output
    if not isinstance(features, Tensor) or output is None:
        raise NotClosedFormError(
            "the closed form needs a classifier that is called once, with a single tensor. Calls of this classifier: "
            f"{len(recorded.features)}."
        )
    if features.ndim < 2 or (features.ndim > 2 and set(features.shape[2:]) != {1}):
        raise NotClosedFormError(
            f"its input has shape {tuple(features.shape)}; the closed form needs one vector for every "
            "sample, as global average pooling gives."
        )
    features, output = features.flatten(1), output.flatten(1)
    entries = features.detach() if recorded.half is None else features.detach().float()
    if recorded.classifier_weight is None:
        raise NotClosedFormError(NOT_LINEAR)
    weight = _as(entries, recorded.classifier_weight).flatten(1)
    if weight.shape[1] != features.shape[1]:
        raise NotClosedFormError(
            f"its filters have {weight.shape[1]} entries, but its input has {features.shape[1]} features, because it "
            "is a convolution with groups or padding. The closed form needs a weight from every feature to every logit."
        )
    bias = None if recorded.classifier_bias is None else _as(entries, recorded.classifier_bias)
    if recorded.half is None:
        _certify_linear(entries, weight, bias, output, recorded.eps)
    else:
        _certify_rounded(entries, weight, bias, output)
    deviation = _certify_logits(logits.detach(), output, shift_invariant)
    in_full = logits.detach() if recorded.half is None else nn.functional.linear(entries, weight, bias)
    return Head(features, weight, deviation, shift_invariant, in_full)


def _as(entries: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor, detached, with the dtype and device of ``entries``; no inference tensor, as autograd needs."""
    tensor = tensor.detach().to(entries)
    return tensor.clone() if tensor.is_inference() else tensor


def _certify_linear(features: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, eps: float) -> None:
    """Certify that the classifier returned ``V g + b``, up to rounding."""
    expected, size = features @ weight.T, features.abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    # A dot product of m terms is rounded about sqrt(m) times, here and in the classifier.
    allowed = (4 * features.shape[1] ** 0.5 + 16) * max(eps, torch.finfo(output.dtype).eps) * size
    if output.shape != expected.shape or not holds(((output - expected).abs() <= allowed).all()):
        raise NotClosedFormError(NOT_LINEAR)


def _certify_rounded(features: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Certify that a classifier in half precision returned ``V g + b``.

    All arguments except the output are float32. The features and the weight are first rounded to half precision, as the
    classifier rounds them. The allowed error covers a classifier that also rounds partial sums.
    """
    features, weight = features.to(output.dtype).float(), weight.to(output.dtype).float()
    expected, size = features @ weight.T, (features.square() @ weight.square().T).sqrt()
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    allowed = 4 * torch.finfo(output.dtype).eps * (size + expected.abs())
    if output.shape != expected.shape or not holds(((output - expected).abs() <= allowed).all()):
        raise NotClosedFormError(NOT_LINEAR)


NOT_LINEAR = (
    "it does not return weight @ input + bias, e.g. because it is a cosine, normalised or adapted classifier, or "
    "because its output is changed in place. So the closed form does not hold for it."
)


def _certify_logits(logits: Tensor, output: Tensor, shift_invariant: bool) -> Tensor:
    """Certify that the model returned the classifier's output as its logits.

    Each logit is compared with the same entry of the classifier's output. The difference is divided by the larger of
    the two absolute values. Return the largest quotient.

    With ``shift_invariant``, the model may have added a number to all logits of a sample. The difference at the
    likeliest class is taken as this number, and subtracted from all differences. Every divisor is then increased by the
    divisor of the likeliest class.
    """
    if logits.shape != output.shape:
        raise NotClosedFormError(
            f"the model returns {logits.shape[1]} logits, but this last linear layer returns {output.shape[1]} values. "
            "The layer is not the classifier, so the closed form does not hold."
        )
    if logits.data_ptr() == output.data_ptr() and logits.stride() == output.stride() and logits.dtype == output.dtype:
        return logits.new_zeros((), dtype=torch.float64)  # the same tensor
    # Each difference is divided by the size of its own logit. Relative to the largest logit, the change of a small
    # logit could look like rounding.
    difference, scale = logits.double() - output, torch.maximum(logits.abs(), output.abs()).double()
    if shift_invariant:  # the number that was added is read off the likeliest class
        top = output.argmax(1, keepdim=True)
        difference, scale = difference - difference.gather(1, top), scale + scale.gather(1, top)
    deviation = (difference.abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).amax()
    if not holds(deviation <= 16 * max(torch.finfo(tensor.dtype).eps for tensor in (output, logits))):
        cause = (
            "the model returns probabilities. Return the logits instead, because the loss applies the softmax"
            if are_probabilities(logits)
            else "something after it changes the logits, e.g. a temperature, a soft cap, added priors or masked classes"
        )
        raise NotClosedFormError(
            f"the model does not return the output of this layer (relative deviation {deviation:.1e}): {cause}. The "
            "closed form holds only if the loss takes the classifier's own output."
        )
    return deviation
