"""Observing a forward pass that the user makes, once a forward pass of our own has shown that this changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_flatness.capture.isolation import BACKWARD_HOOKS, HALF, ModelCopy, untouched
from lightning_flatness.capture.observation import Observation
from lightning_flatness.errors import FlatnessError

Result = TypeVar("Result")


class Listener:
    """Listens, for the time of a ``with`` block, for the one call of a model on given inputs, and observes it.

    Calls on anything else are let pass. Errors of ours are kept in :attr:`reason` and never raised; modes are as they
    were when the call is done, also when it raises.

    Args:
        model: the network.
        inputs: of the call: one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments;
            None for any.
        observe: makes an :class:`Observation` (``live=True``).

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> x = torch.randn(4, 1, 8)
        >>> observe = lambda: Observation({"0": net[0]}, net[3], live=True)
        >>> with torch.inference_mode(), Listener(net, x, observe) as heard:
        ...     logits = net(x)
        >>> heard.reason, heard.seen.features[0].requires_grad, logits.requires_grad
        ('', True, False)
    """

    def __init__(self, model: nn.Module, inputs: Any, observe: Callable[[], Observation]) -> None:
        self.inputs = inputs
        self.seen: Observation | None = None
        self.output: Any = None
        self.reason = "validation does not call the network, or on other inputs than those of the batch"
        self._model = model
        self._observe = observe
        self._depth = 0  # of calls within the observed one
        self._num_calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Listener:
        self._handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._depth:  # interrupted
            self._end("the forward pass was interrupted")

    def release(self) -> None:
        """Let go of all tensors."""
        if self.seen is not None:
            self.seen.layers.clear()
            self.seen.features.clear()
        self.seen = self.output = self.inputs = None

    def _before(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._depth:
            self._depth += 1
            return
        if not _are(self.inputs, arguments, keywords):
            return
        self._num_calls += 1
        self.seen = None
        if self._num_calls > 1:
            self.reason = "validation calls the network more than once on a batch"
        elif torch.is_grad_enabled():
            self.reason = "validation records gradients"
        elif any(torch.is_autocast_enabled(device) for device in _device_types(model)):
            self.reason = "validation runs under autocast"
        else:
            self.reason = ""
            self.seen = self._observe()
            self.seen.__enter__()
            self._depth = 1

    def _after(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if self._depth != 1:
            self._depth = max(0, self._depth - 1)
            return None
        assert self.seen is not None
        without_classifier = self.seen.classifier is None
        self._end("" if output is not None else "the network raised an error")
        self.output = output
        # Without a classifier the graph goes on to the output. In inference mode a clone is what it would have been.
        return apply_to_collection(output, Tensor, lambda made: made.detach().clone()) if without_classifier else None

    def _end(self, reason: str) -> None:
        self._depth = 0
        assert self.seen is not None
        self.seen.__exit__()
        self.reason = reason or self.reason


def why_not_observed(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Why the user's forward passes of a model are not to be observed; nothing, if they may be.

    Args:
        model: the network.
        dtype: that it is to be measured in; by default its own, at least float32.

    Example:
        >>> why_not_observed(nn.Dropout().train())
        "module 'Dropout' is in training mode"
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and (tensor.dtype in HALF or tensor.dtype != (dtype or tensor.dtype)):
            return f"weights in {tensor.dtype} are measured in {dtype or torch.float32}"
        if tensor.is_inference():
            return "weights or buffers were made in inference mode"
    for name, module in model.named_modules():
        what = f"module '{name or type(module).__name__}'"
        if module.training:
            return f"{what} is in training mode"
        if "_orig_mod" in dict(module.named_children()) or getattr(module, "_compiled_call_impl", None) is not None:
            return f"{what} is compiled"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{what} is TorchScript"
        if any(vars(module).get(hooks) for hooks in BACKWARD_HOOKS):
            return f"{what} has backward hooks"
    return ""


def try_observing(
    model: nn.Module,
    inputs: Any,
    observe: Callable[[Mapping[nn.Parameter, Tensor]], Observation],
    measure: Callable[[Listener], Result],
) -> tuple[Result | None, str]:
    """Do in a forward pass of our own what is to be done in the user's, under the modes that are on now.

    Args:
        model: the network; it is left as it was.
        inputs: of the pass.
        observe: makes an :class:`Observation` (``live=True``) of a pass on copies of parameters.
        measure: is called with what was heard.

    Returns:
        What ``measure`` returned; or why the user's forward passes must not be observed.
    """
    with torch.inference_mode(False):
        copy = ModelCopy(model)
        # The graph is as in the user's pass only if parameters ask for gradients as theirs do.
        own = {p: copy.copy_of(p).requires_grad_(p.requires_grad) for p in model.parameters()}
    with untouched(model):
        expected = copy(inputs, own)
    with untouched(model):
        heard = Listener(model, None, lambda: observe(own))
        try:
            with heard:
                output = copy(inputs, own)
        except Exception as error:
            return None, f"the network fails when it is observed ({type(error).__name__}: {error})"
        reason = heard.reason or _why_different(output, expected)
        if reason:
            return None, reason
        alive = _mark_graph(heard)
        try:
            found = measure(heard)
        except FlatnessError as error:
            return None, str(error)
        finally:
            heard.release()
        del output, expected
        if alive() is not None:
            gc.collect()
        if alive() is not None:
            return None, "the network keeps tensors of the pass (features, in an attribute or a list)"
        return found, ""


class _Token:
    pass


def _mark_graph(heard: Listener) -> weakref.ref[_Token]:
    """Something that lives as long as any tensor of the observed graph."""
    assert heard.seen is not None
    token = _Token()
    outputs = [call.output for calls in heard.seen.layers.values() for call in calls]
    with torch.inference_mode(False), torch.enable_grad():
        for output in outputs:
            metadata: Any = get_gradient_edge(output).node.metadata
            metadata["lightning_flatness"] = token
    return weakref.ref(token)


def _why_different(output: Any, expected: Any) -> str:
    found: list[list[Tensor]] = [[], []]
    for tensors, part in zip(found, (output, expected), strict=True):
        apply_to_collection(part, Tensor, tensors.append)
    if len(found[0]) != len(found[1]) or not all(map(_identical, *found)):
        return "the network returns other values when it is observed"
    if any(tensor.requires_grad for tensor in found[0]):
        return "the network returns more than what its classifier makes"
    return ""


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach(), other.detach())


def same_inputs(one: Any, other: Any) -> bool:
    """Whether two inputs of a model are the very same tensors.

    Example:
        >>> x = torch.ones(2)
        >>> same_inputs((x, 1), (x, 1)), same_inputs(x, x.clone())
        (True, False)
    """
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_inputs, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_inputs(one[key], other[key]) for key in one)
    return one is other


def _are(inputs: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a call with these arguments is the one on these inputs; ``None`` are any."""
    if inputs is None:
        return True
    if isinstance(inputs, Mapping):
        return not arguments and same_inputs(inputs, keywords)
    return not keywords and same_inputs(inputs if isinstance(inputs, (tuple, list)) else (inputs,), arguments)


def _device_types(model: nn.Module) -> set[str]:
    return {"cpu"} | {parameter.device.type for parameter in model.parameters()}
