"""Find the classifier, which is the linear layer whose output in a training step is the logits of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_flatness.callbacks.lightning_imports import LightningModule
from lightning_flatness.errors import FlatnessError, NotClosedFormError
from lightning_flatness.functional.graph_walk import functions_of
from lightning_flatness.layers.certificates.head import certify_head
from lightning_flatness.layers.recording import REDUCED_EPS, Pass
from lightning_flatness.layers.tracing import LAYERS
from lightning_flatness.model.isolation import float32_is_reduced
from lightning_flatness.model.names import plain_name
from lightning_flatness.model.precision import HALF


class StepCall(NamedTuple):
    """One call of a layer in a training step: the layer's name, its input and its output.

    The tensors are those of the step itself, with their autograd graph.
    """

    name: str
    features: Any  # the layer's input
    logits: Tensor  # the layer's output, which are the logits of the loss if the layer is the classifier
    computed: Mapping[str, Tensor]  # weight and bias, by name, if a parametrization has computed them

    def applied(self, layer: nn.Module, name: str) -> Tensor | None:
        """Return the layer's weight or bias in this call.

        To read the attribute would compute it again, which may write to buffers or draw random numbers.
        """
        tensor = self.computed[name] if name in self.computed else getattr(layer, name, None)
        return tensor if isinstance(tensor, Tensor) else None


class CallRecorder:
    """Records the calls of layers with forward hooks, but only while ``listens`` is True.

    The classifier keeps its hook for the whole fit, because compiled code ignores hooks that are added after
    compilation. If a layer is copied, the hook of the copy records nothing.
    """

    def __init__(self) -> None:
        self.listens = False
        self.calls: list[StepCall] = []
        # The latest weight and bias that parametrizations have computed, by the names of the layer and of the tensor.
        self.computed: dict[str, dict[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, layers: dict[str, nn.Module]) -> None:
        """Stop recording, drop the recorded calls, and put hooks on these layers only."""
        self.detach()
        for name, layer in layers.items():
            hook = _Hook(self, name)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            if is_parametrized(layer):
                for key, parametrization in layer.parametrizations.items():  # type: ignore[union-attr, operator]
                    self._handles.append(parametrization.register_forward_hook(_ComputedHook(hook, key)))

    def detach(self) -> None:
        """Remove all hooks, and drop the recorded calls."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.listen(False)

    def listen(self, listens: bool) -> None:
        """Drop the recorded calls. Then start recording if ``listens`` is True, or stop recording if it is False."""
        self.calls.clear()
        self.computed.clear()
        self.listens = listens

    def take(self) -> list[StepCall]:
        """Stop recording, and return the recorded calls."""
        calls = list(self.calls)
        self.listen(False)
        return calls


class _Hook:
    """A forward hook that appends the calls of one layer to a recorder."""

    def __init__(self, recorder: CallRecorder | None, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        # A call without gradients belongs to a teacher network, or to a segment under activation checkpointing.
        if self.recorder is not None and self.recorder.listens and isinstance(output, Tensor) and output.requires_grad:
            features = arguments[0] if len(arguments) > 0 else keywords.get("input")
            computed = dict(self.recorder.computed.get(self.name, {}))
            self.recorder.calls.append(StepCall(self.name, features, output, computed))

    def __reduce__(self) -> Any:
        return _Hook, (None, self.name)  # a copy or pickle of the module must not contain the callback


class _ComputedHook:
    """A forward hook that keeps the latest tensor that a parametrization of one layer has computed."""

    def __init__(self, hook: _Hook, key: str) -> None:
        self.hook, self.key = hook, key

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        recorder = self.hook.recorder
        if recorder is not None and recorder.listens:
            recorder.computed.setdefault(self.hook.name, {})[self.key] = output


def linear_layers(pl_module: LightningModule, layers: str) -> dict[str, nn.Module]:
    """Return the layers that may be the classifier, as a dict from names to layers.

    With ``layers="classifier"`` these are all linear layers and convolutions. Any other ``layers`` is the name of one
    layer, and the dict has this layer only.
    """
    every: dict[str, nn.Module] = {plain_name(name): module for name, module in pl_module.named_modules()}
    named = {name: module for name, module in every.items() if isinstance(module, LAYERS)}
    if layers == "classifier":
        return named
    if plain_name(layers) not in named:
        there = ", ".join(f"'{name}'" for name in list(named)[-5:]) or "none"
        raise FlatnessError(
            f"FlatnessPenalty: layers={layers!r} names no linear layer or convolution of {type(pl_module).__name__}. "
            f"Its last such layers are: {there}."
        )
    return {plain_name(layers): named[plain_name(layers)]}


def find_classifier(calls: Sequence[StepCall], layers: dict[str, nn.Module], why_not: Callable[[StepCall], str]) -> str:
    """Return the name of the classifier, which is the layer that computes the logits of the loss in a training step.

    ``calls`` are the recorded calls of this step. ``why_not`` takes a call, and returns the reason why the output of
    this call is not the logits of the loss. The reason is empty if the output is the logits.

    The classifier is a linear layer that is called on one vector per sample and returns the logits. Calls are checked
    from the last to the first. When a call fits, earlier calls on which its output depends are not checked.

    Raises:
        FlatnessError: No call returns the logits, or several calls that do not depend on each other return logits.
    """
    remaining = [call for call in reversed(calls) if _is_on_vectors(call)]
    found: list[str] = []
    reasons: list[str] = []
    while remaining:
        call = remaining.pop(0)
        reason = _why_not_linear(layers[call.name], call) or why_not(call)
        if reason:
            reasons.append(f"'{call.name}': {reason}")
            continue
        found.append(call.name)
        upstream = set(functions_of([call.logits]))
        remaining = [other for other in remaining if other.logits.grad_fn not in upstream]
    if len(found) == 1:
        return found[0]
    if len(set(found)) == 1:
        raise FlatnessError(f"FlatnessPenalty: {called_often(found[0], len(found))}")
    if found:
        raise FlatnessError(
            f"FlatnessPenalty: the loss takes logits of several layers, {' and '.join(map(repr, reversed(found)))}. "
            f"Name one of them with layers=, e.g. layers={found[0]!r}. To penalise another of them, too, add a second "
            "FlatnessPenalty with its own prefix= and check_loss=False."
        )
    if not reasons:
        raise FlatnessError(
            "FlatnessPenalty finds no classifier. The training step must call an nn.Linear of the LightningModule, or "
            "a convolution on pooled features. Functional calls such as F.linear are not seen. The output of the call "
            "must require gradients and have shape (samples, classes). "
            f"{BY_HAND}"
        )
    raise FlatnessError(
        f"FlatnessPenalty finds no classifier. {'; '.join(reasons[:3])}. If your cross-entropy has options, give them "
        "to the callback, too: label_smoothing=, class_weight= and ignore_index=. If the callback does not find the "
        "targets, give batch_fn=. If the loss is another function of the logits, or has other terms that depend on "
        f"them, check_loss=False penalises the flatness of cross-entropy all the same. {BY_HAND}"
    )


def why_not_finite(calls: Sequence[StepCall], loss: Tensor) -> str:
    """Return an error message if a tensor of the first training step is not finite, otherwise an empty string.

    With such a tensor, no layer can be shown to be the classifier. The message names the first such tensor. The loss is
    checked last.
    """
    named = [
        (f"the {what} of '{call.name}' is not finite", tensor)
        for call in calls
        for what, tensor in (("input", call.features), ("output", call.logits))
        if isinstance(tensor, Tensor)
    ]
    for problem, tensor in [*named, (f"the loss is {float(loss)}", loss)]:
        if not torch.isfinite(tensor).all():
            return (
                f"FlatnessPenalty cannot find the classifier, because {problem} in the first training step. Check the "
                "data and the network's weights."
            )
    return ""


def called_often(name: str, number: int) -> str:
    """Return the message that a training step calls the classifier ``number`` times instead of once."""
    return f"the training step calls '{name}' {number} times with gradients. Call this layer only once. {BY_HAND}"


BY_HAND = (
    "Or remove the callback, and add lightning_flatness.functional.flatness_penalty(features, logits, weight) to the "
    "loss in training_step."
)


def _is_on_vectors(call: StepCall) -> bool:
    """Return whether a layer's input and output have one vector per sample, as in ``(N, m)`` or ``(N, m, 1, 1)``."""
    shapes = [tensor.shape for tensor in (call.features, call.logits) if isinstance(tensor, Tensor)]
    return len(shapes) == 2 and all(len(shape) >= 2 and set(shape[2:]) <= {1} for shape in shapes)


def _why_not_linear(layer: nn.Module, call: StepCall) -> str:
    """Return why a layer's output is not its weight times its input plus its bias, or an empty string if it is."""
    logits = call.logits.detach().flatten(1)
    reduced = logits.dtype == torch.float32 and float32_is_reduced(logits.device)
    eps = REDUCED_EPS if reduced else torch.finfo(logits.dtype).eps
    half = logits.dtype if logits.dtype in HALF else None
    try:
        weights = call.applied(layer, "weight"), call.applied(layer, "bias")
        step = Pass(None, logits, {}, (call.features,), logits, (), eps, half, (), *weights)
        certify_head(layer, step, shift_invariant=False)
    except NotClosedFormError as error:
        return str(error)
    return ""
