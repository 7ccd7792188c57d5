"""Observing a forward pass that the user makes, once a forward pass of our own has shown that this changes nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_flatness.errors import FlatnessError
from lightning_flatness.layers.recording import Observation
from lightning_flatness.model.copy import HALF, ModelCopy
from lightning_flatness.model.isolation import BACKWARD_HOOKS, accelerators, untouched

Result = TypeVar("Result")


class Listener:
    """Listens, for the time of a ``with`` block, for the one call of a model on given inputs, and observes it.

    Calls on anything else are let pass. Errors of ours are kept in :attr:`reason` and never raised; modes are as they
    were when the call is done, also when it raises. One that fails with gradients on is run again without.

    Args:
        model: the network; meanwhile its ``forward`` is ours, which calls it.
        inputs: of the call: one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments;
            None for any.
        observe: makes an :class:`Observation` (``live=True``).
        within: modules of the network whose call is as good (:func:`same_calls`).

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> x = torch.randn(4, 1, 8)
        >>> observe = lambda: Observation({"0": net[0]}, net[3], live=True)
        >>> with torch.inference_mode(), Listener(net, x, observe) as heard:
        ...     logits = net(x)
        >>> heard.reason, heard.seen.features[0].requires_grad, logits.requires_grad
        ('', True, False)
    """

    _observing: ClassVar[bool] = False  # one at a time: two would put their nodes into each other's graphs

    def __init__(
        self, model: nn.Module, inputs: Any, observe: Callable[[], Observation], within: Sequence[nn.Module] = ()
    ) -> None:
        self.inputs = inputs
        self.seen: Observation | None = None
        self.output: Any = None
        self.reason = NOT_HEARD
        self._model = model
        self._observe = observe
        self._num_calls = 0
        self._within = False  # the call that counts
        self._modules = [model, *within]
        self._ours: list[tuple[nn.Module, Any, dict[str, Any]]] = []  # with the forward that an instance had of its own
        self._state: list[Any] = []

    def __enter__(self) -> Listener:
        # Not hooks: those do not run when a forward is interrupted by hand, nor for calls of `forward` itself.
        for module in self._modules:
            own = {name: value for name, value in vars(module).items() if name == "forward"}
            ours = _Forward(self, module)
            vars(module)["forward"] = ours
            self._ours.append((module, ours, own))
        self._state = _state(self._model)
        return self

    def __exit__(self, *error: object) -> None:
        for module, ours, own in self._ours:
            if vars(module).get("forward") is ours:
                del vars(module)["forward"]
                vars(module).update(own)
        self._ours = []

    def release(self) -> None:
        """Let go of all tensors."""
        if self.seen is not None:
            self.seen.layers.clear()
            self.seen.features.clear()
        self.seen = self.output = self.inputs = None

    def graph(self) -> weakref.ref[Any]:
        """Something that lives as long as any tensor of the observed graph."""
        token = _Token()
        layers = [] if self.seen is None else [layer for calls in self.seen.layers.values() for layer in calls]
        with torch.inference_mode(False), torch.enable_grad():
            for layer in layers:
                metadata: Any = get_gradient_edge(layer.output).node.metadata
                metadata["lightning_flatness"] = token
        return weakref.ref(token)

    def hear(self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a forward, and observe it if that is the one."""
        if self._within or not _are(self.inputs, arguments, keywords):
            return forward(*arguments, **keywords)
        self._num_calls += 1
        self.seen = self.output = None
        self.reason = self._why_not_now()
        self._within = True
        try:
            if not self.reason:
                # A guard around all: what a forward enters and leaves cannot change the modes that come after.
                with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
                    self.output = self._try(forward, arguments, keywords)
            if self.reason:
                return forward(*arguments, **keywords)
        finally:
            self._within = False
        assert self.seen is not None
        if self.seen.classifier is not None:
            return self.output
        # Without a classifier the graph goes on to the output. In inference mode a clone is what it would have been.
        return apply_to_collection(self.output, Tensor, lambda made: made.detach().clone())

    def _try(self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self.seen = self._observe()
        Listener._observing = True
        try:
            with self.seen:
                return forward(*arguments, **keywords)
        except BaseException as error:
            self.reason = f"the network fails when it is observed ({type(error).__name__}: {error})"
            # Autograd refuses by RuntimeErrors what a graph cannot have.
            if not (self.seen.layers and isinstance(error, RuntimeError)):
                self.reason = "the network raised an error"
                raise
        finally:
            Listener._observing = False
            if self.reason:
                self.seen = None

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
    """Stands in for a module's forward while a listener listens; copies and pickles have the module's own."""

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


def same_calls(model: nn.Module, forward: Callable[[], Any]) -> tuple[Any, list[nn.Module]]:
    """What a model returns, and modules within it that get its very inputs, once, and return its very output.

    A LightningModule's forward often is such a call; its steps may call the one or the other.

    Args:
        model: the network.
        forward: calls it.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        >>> same_calls(net, lambda: net(torch.ones(3, 2, 2)))[1] == [net[0]]
        True
    """
    calls: dict[nn.Module, list[tuple[Any, Any, Any]]] = {}

    def note(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        calls.setdefault(module, []).append((arguments, keywords, output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        returned = forward()
    finally:
        for handle in handles:
            handle.remove()
    arguments, keywords, output = calls[model][0]
    return returned, [
        module
        for module, (found, *more) in calls.items()
        if module is not model
        and not more
        and same_inputs(found[0], arguments)
        and same_inputs(found[1], keywords)
        and found[2] is output
    ]


KEEPS_TENSORS = "the network keeps tensors of the pass (features, in an attribute or a list)"
NOT_HEARD = "validation does not call the network, or on other inputs than those of the batch"


class _Token:
    pass


def _state(model: nn.Module) -> list[Any]:
    """Modes and numbers of hooks, of all modules."""
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


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
        if isinstance(module.forward, _Forward):
            return "another callback observes the same network"
        what = f"module '{name or type(module).__name__}'"
        if module.training:
            return f"{what} is in training mode"
        if "_orig_mod" in dict(module.named_children()) or any(vars(module).get(name) for name in COMPILERS):
            return f"{what} is compiled"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{what} is TorchScript"
        if any(vars(module).get(hooks) for hooks in BACKWARD_HOOKS):
            return f"{what} has backward hooks"
    return ""


# What torch's and Lightning's ways to compile a module set on it.
COMPILERS = ("_compiled_call_impl", "_compiler_ctx")


def try_observing(
    model: nn.Module,
    inputs: Any,
    observe: Callable[[Mapping[nn.Parameter, Tensor]], Observation],
    measure: Callable[[Listener], Result],
) -> tuple[Result | None, str, list[nn.Module]]:
    """Do in a forward pass of our own what is to be done in the user's, under the modes that are on now.

    Args:
        model: the network; it is left as it was.
        inputs: of the pass.
        observe: makes an :class:`Observation` (``live=True``) of a pass on copies of parameters.
        measure: is called with what was heard.

    Returns:
        What ``measure`` returned; or why the user's forward passes must not be observed; and :func:`same_calls`.
    """
    with torch.inference_mode(False):
        model_copy = ModelCopy(model)
        # The graph is as in the user's pass only if parameters ask for gradients as theirs do.
        own = {p: model_copy.copy_of(p).requires_grad_(p.requires_grad) for p in model.parameters()}
    with untouched(model):
        expected, within = same_calls(model, lambda: model_copy(inputs, own))
    with untouched(model):
        heard = Listener(model, None, lambda: observe(own))
        try:
            with heard:
                output = model_copy(inputs, own)
        except Exception as error:
            return None, f"the network fails when it is observed ({type(error).__name__}: {error})", []
        reason = heard.reason or _why_different(output, expected)
        if reason:
            return None, reason, []
        if model_copy.keeps_graph:
            return None, "the network writes features to a buffer", []
        alive = heard.graph()
        try:
            found = measure(heard)
        except (FlatnessError, RuntimeError) as error:  # of autograd, or no memory
            return None, str(error), []
        finally:
            heard.release()
        del output, expected
        if alive() is not None:
            gc.collect()
        if alive() is not None:
            return None, KEEPS_TENSORS, []
        return found, "", within


def _why_different(output: Any, expected: Any) -> str:
    found: list[list[Tensor]] = [[], []]
    for tensors, part in zip(found, (output, expected), strict=True):
        apply_to_collection(part, Tensor, tensors.append)
    if any(tensor.requires_grad for tensor in found[0]):
        return "the network returns more than what its classifier makes"
    if len(found[0]) != len(found[1]) or not all(map(_identical, *found)):
        return "the network returns other values when it is observed"
    return ""


def _identical(one: Tensor, other: Tensor) -> bool:
    kinds = [(tensor.dtype, tensor.is_inference()) for tensor in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one.detach(), other.detach())


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
