"""Observing a forward pass of the user's, after a trial on a pass of our own has shown that this changes nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_flatness.errors import BatchError
from lightning_flatness.layers.recording import Pass, Recorder
from lightning_flatness.model.isolation import accelerators


class Listener:
    """A context manager that observes the one call of a model on given inputs.

    Inside the ``with`` block, the ``forward`` of the model, and of modules with the same inputs and output, is replaced
    by a wrapper of it. Calls on other inputs are not observed; inputs of None match every call. Our own errors are kept
    in :attr:`reason` and never raised. After the call, modes are as they were before it, even if it raises. If the
    observed forward fails, it is run again unobserved.
    """

    _observing: ClassVar[bool] = False  # only one may: nodes of two would be in each other's graphs

    def __init__(
        self, model: nn.Module, inputs: Any, recorder: Callable[[], Recorder], same_calls: Sequence[nn.Module] = ()
    ) -> None:
        self.inputs = inputs
        self.reason = NOT_HEARD  # why the call was not observed; empty if it was
        self._model, self._recorder = model, recorder
        self._recorded: Recorder | None = None  # of the call
        self._output: Any = None  # of the call
        self._num_calls = 0
        self._is_called = False  # while the call that counts runs
        self._modules = [model, *same_calls]
        self._ours: list[tuple[nn.Module, Any, dict[str, Any]]] = []  # with the instance's own forward, if any
        self._state: list[Any] = []

    def result(self) -> Pass:
        """Return the observed forward pass; raise an error if there is none."""
        recorder = self._recorded
        if recorder is None or self.reason or recorder.failure is not None:
            raise BatchError(self.reason or f"observing failed ({recorder and recorder.failure})")
        return recorder.result(self.inputs, self._output)

    def __enter__(self) -> Listener:
        # Hooks would not run when the user interrupts a forward, nor for direct calls of `forward`.
        for module in self._modules:
            own = {name: value for name, value in vars(module).items() if name == "forward"}
            self._ours.append((module, _Forward(self, module), own))
            vars(module)["forward"] = self._ours[-1][1]
        self._state = _state(self._model)
        return self

    def __exit__(self, *error: object) -> None:
        for module, ours, own in self._ours:
            if vars(module).get("forward") is ours:
                del vars(module)["forward"]
                vars(module).update(own)
        self._ours = []

    def release(self) -> None:
        """Drop all references to tensors."""
        self._recorded = self._output = self.inputs = None

    def graph(self) -> weakref.ref[Any]:
        """Return a weak reference that is alive as long as any tensor of the observed graph."""
        token = _Token()
        with torch.inference_mode(False), torch.enable_grad():
            for node in [] if self._recorded is None else self._recorded.nodes:
                metadata: Any = get_gradient_edge(node).node.metadata
                metadata["lightning_flatness"] = token
        return weakref.ref(token)

    def hear(self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a module's forward, and observe the call if its arguments are the inputs of this listener."""
        if self._is_called or not _are(self.inputs, arguments, keywords):
            return forward(*arguments, **keywords)
        self._num_calls += 1
        self._recorded = self._output = None
        self.reason = self._why_not_now()
        self._is_called = True
        try:
            if not self.reason:
                # Whatever modes the forward enters or leaves, these contexts restore them afterwards.
                with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
                    self._observe(forward, arguments, keywords)
            if self.reason:
                return forward(*arguments, **keywords)
        finally:
            self._is_called = False
        if self._recorded is None or self._recorded.has_classifier:
            return self._output
        # Without a classifier the output is in the graph. In inference mode the clone is an inference tensor.
        return apply_to_collection(self._output, Tensor, lambda made: made.detach().clone())

    def _observe(self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        recorder = self._recorder()
        Listener._observing = True
        try:
            with recorder:
                self._output = forward(*arguments, **keywords)
            self._recorded = recorder
        except BaseException as error:
            self.reason = f"the network fails when it is observed ({type(error).__name__}: {error})"
            # Autograd raises RuntimeErrors for operations that a graph cannot contain.
            if not (recorder.nodes and isinstance(error, RuntimeError)):
                self.reason = "the network raised an error"
                raise
        finally:
            Listener._observing = False

    def _why_not_now(self) -> str:
        if self._num_calls > 1:
            return "validation calls the network more than once on a batch"
        if Listener._observing:
            return "another callback observes the same forward pass"
        if torch.is_grad_enabled():
            return "validation records gradients"
        device_types = {"cpu"} | {device.type for device in accelerators(self._model)}
        if any(map(torch.is_autocast_enabled, device_types)):
            return "validation runs under autocast"
        if _state(self._model) != self._state:
            return "validation changes modes or hooks of modules"
        return ""


class _Forward:
    """A wrapper of a module's forward while a listener is active; copies and pickles contain the original forward."""

    def __init__(self, listener: Listener, module: nn.Module) -> None:
        self._listener, self._module, self.__wrapped__ = listener, module, module.forward

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():  # an export in the middle of a step
            return self.__wrapped__(*arguments, **keywords)
        return self._listener.hear(self.__wrapped__, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "__wrapped__"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        if getattr(self.__wrapped__, "__self__", None) is self._module:
            return getattr, (self._module, "forward")
        return _itself, (self.__wrapped__,)


def _itself(forward: Any) -> Any:
    return forward


KEEPS_TENSORS = "the network keeps tensors of the pass (features, in an attribute or a list)"
NOT_HEARD = "validation does not call the network, or on other inputs than those of the batch"


class _Token:
    """An object that is alive as long as the graph that holds it."""


def _state(model: nn.Module) -> list[Any]:
    """Return the training modes and the numbers of hooks of all modules."""
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def is_observed(module: nn.Module) -> bool:
    """Return whether a listener observes a module."""
    return isinstance(module.forward, _Forward)


def same_inputs(one: Any, other: Any) -> bool:
    """Return whether two inputs of a model consist of identical tensor objects."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_inputs, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_inputs(one[key], other[key]) for key in one)
    return one is other


def _are(inputs: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether a call with these arguments is a call on ``inputs``; ``None`` matches every call."""
    if isinstance(inputs, Mapping):
        return not arguments and same_inputs(inputs, keywords)
    positional = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return inputs is None or (not keywords and same_inputs(positional, arguments))
