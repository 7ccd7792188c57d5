"""Record one forward pass: the convolutions of the layers, and the input and output of the classifier.

The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.convolution import CONVOLVING, Convolution, described, version_of
from lightning_flatness.model.copy import FREEZING
from lightning_flatness.model.isolation import float32_is_reduced
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.precision import HALF

# The machine epsilon of TF32, whose mantissa has ten bits.
REDUCED_EPS = 2.0**-10
# Functions that read of their first argument, or of the others, at most shape, dtype and device.
LIKE_FIRST = {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros_like", "ones_like", "empty_like"),
    *("full_like", "rand_like", "randn_like"),
}
LIKE_OTHER = {"type_as", "to", "expand_as", "view_as", "reshape_as"}


@dataclass(frozen=True)
class LayerCall:
    """The record of one call of one layer in a forward pass."""

    module: nn.Module
    convolutions: tuple[Convolution, ...]  # the convolutions that ran inside the module's forward
    returned: Tensor  # what the module returned, detached
    node: Tensor  # the same values as a tensor of the autograd graph, at which derivatives are taken
    kernel_sample: Tensor | None = None  # in a user's pass, a copy of some entries of the kernel
    versions: tuple[int | None, ...] | None = None  # version counters of the inputs after the call; None if not known
    has_changed_output: bool = False  # whether the layer or a hook has changed an output of a convolution in place

    @property
    def has_changed_input(self) -> bool:
        """Whether the model has changed an input in place after the layer ran; False if this is not known."""
        return self.versions is not None and self.versions != versions_of(self.convolutions)

    @property
    def convolution(self) -> Convolution:
        """The convolution that ran. Requires: exactly one ran, which ``certificates/layer.py`` tests."""
        return self.convolutions[0]


@dataclass(frozen=True)
class Pass:
    """The record of a forward pass on some samples, which keeps the autograd graph of the pass alive."""

    inputs: Any  # the inputs of the model
    logits: Tensor  # (N, K), which the model returned
    calls: Mapping[str, tuple[LayerCall, ...]]  # keyed by layer name; the calls of a layer in their order
    features: tuple[Any, ...]  # the argument of each call of the classifier; None if it did not have exactly one
    classifier_output: Tensor | None
    kernel_uses: tuple[tuple[str, str], ...]  # pairs of a layer's name and a function that took its kernel
    eps: float  # machine epsilon of matrix products: of TF32 if torch's flags allow it, else of the logits' dtype
    half: torch.dtype | None = None  # half-precision dtype of layers, classifier or logits; None if there is none
    late: tuple[str, ...] = ()  # names of idle layers (see Recorder) that ran
    classifier_weight: Tensor | None = None  # what the latest call of the classifier applied; None if not known
    classifier_bias: Tensor | None = None
    enables_autocast: bool = False  # whether the forward enables autocast itself


def in_float32(call: LayerCall) -> LayerCall:
    """Return a copy of the record of a layer's call, in which the inputs of the convolution are float32.

    The inputs are first rounded to the dtype of the convolution's output, because autocast rounds them to that dtype.
    """
    convolution = call.convolution
    inputs = convolution.inputs.to(convolution.output.dtype).float()
    read = None if convolution.unpadded is None else convolution.unpadded.to(convolution.output.dtype).float()
    return replace(call, convolutions=(replace(convolution, inputs=inputs, unpadded=read),))


class Recorder:
    """A context manager that records one forward pass.

    From the first layer on, the pass builds an autograd graph; all values stay the same. At the end of the block, also
    after an error, hooks are removed and the grad mode is restored.

    Args:
        layers: the layers to record, keyed by name.
        classifier: the classifier, or None.
        watched: the kernel of each layer, keyed by layer name. Every function that takes one of these tensors is
            recorded.
        idle: other layers, keyed by name. The record names those of them that run.
        live: whether the pass runs as the user's passes do. If so, the graph is built even under ``no_grad`` or in
            inference mode, and it ends at the classifier's input. Errors in hooks of the recorder are then kept in
            :attr:`failure` instead of being raised.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        classifier: nn.Module | None,
        watched: Mapping[str, Tensor] | None = None,
        idle: Mapping[str, nn.Module] | None = None,
        live: bool = False,
    ) -> None:
        self.failure: Exception | None = None
        self.has_classifier = classifier is not None  # the graph of a live pass ends at the classifier's input
        self._layers, self._classifier, self._live = layers, classifier, live
        self._calls: dict[str, list[LayerCall]] = {}
        self._idle, self._late = idle or {}, dict[str, None]()
        self._features: list[Any] = []
        self._classifier_output: Tensor | None = None
        self._classifier_weights: tuple[Tensor | None, Tensor | None] = (None, None)  # weight and bias
        self._reduced: set[str] = set()  # types of devices where torch's flags let float32 run in TF32
        self._functions = _FunctionMode({id(tensor): name for name, tensor in (watched or {}).items()})

    @property
    def nodes(self) -> list[Tensor]:
        """The outputs of the layers that have run so far, as tensors of the autograd graph."""
        return [call.node for calls in self._calls.values() for call in calls]

    def result(self, inputs: Any, output: Any) -> Pass:
        """Return the record of the forward pass, which ran on ``inputs`` and returned ``output``."""
        logits = logits_of(output)
        reduced = logits.device.type in self._reduced and logits.dtype == torch.float32
        eps = REDUCED_EPS if reduced else torch.finfo(logits.dtype).eps
        calls = {name: tuple(of_layer) for name, of_layer in self._calls.items()}
        uses, features = tuple(self._functions.uses), tuple(self._features)
        seen = [*self.nodes, *features, self._classifier_output, logits]
        half = next((one.dtype for one in seen if isinstance(one, Tensor) and one.dtype in HALF), None)
        weights = self._classifier_weights
        return Pass(
            inputs, logits, calls, features, self._classifier_output, uses, eps, half, tuple(self._late), *weights
        )

    def __enter__(self) -> Recorder:
        if self._live:
            self._reduced = {kind for kind in ("cpu", "cuda") if float32_is_reduced(torch.device(kind))}
        self._grad_mode = torch.is_grad_enabled()
        self._modes, self._open = ExitStack(), ExitStack()
        self._open.enter_context(self._functions)
        handles = []
        for name, module in self._layers.items():
            handles.append(module.register_forward_pre_hook(self._quiet(self._before_layer)))
            handles.append(module.register_forward_hook(self._quiet(partial(self._after_layer, name))))
        for name, module in self._idle.items():
            handles.append(module.register_forward_pre_hook(self._quiet(partial(self._before_idle, name))))
        if self._classifier is not None:
            before = self._quiet(self._before_classifier)
            # In the user's pass this hook detaches the input. It runs first, because hooks of the user's may keep the
            # input.
            handles.append(self._classifier.register_forward_pre_hook(before, prepend=self._live, with_kwargs=True))
            handles.append(self._classifier.register_forward_hook(self._quiet(self._after_classifier)))
        for handle in handles:
            self._open.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._leave_tail()
        torch.set_grad_enabled(self._grad_mode)

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``hook`` unchanged for a pass of our own.

        For a user's pass, return a function that calls ``hook`` and stores an error of ``hook`` in :attr:`failure`.
        """
        if not self._live:
            return hook

        def quiet(*arguments: Any) -> Any:
            try:
                return hook(*arguments)
            except Exception as error:
                self.failure = error
                self._modes.close()
                return None

        return quiet

    def _before_layer(self, module: nn.Module, arguments: Any) -> None:
        """Begin a new list for the convolutions that run inside a layer."""
        self._functions.running.append([])

    def _before_idle(self, name: str, module: nn.Module, arguments: Any) -> None:
        """Record that an idle layer runs."""
        self._late[name] = None

    def _after_layer(self, name: str, module: nn.Module, arguments: Any, returned: Any) -> Any:
        """Record the call of a layer, and return its output as a tensor of the autograd graph."""
        convolutions = tuple(self._functions.running.pop())
        sample = kernel_sample(convolutions[0].weight) if self._live and convolutions else None
        if not isinstance(returned, Tensor):
            raise LayerSelectionError(
                f"Layer '{name}' returns a {type(returned).__name__}, not a tensor. Choose another layer with layers=."
            )
        if self._live and module is self._classifier:  # the graph ends at the classifier's input
            self._keep(name, LayerCall(module, convolutions, returned.detach(), returned.detach(), sample))
            return None
        self._record_gradients()
        node = returned
        if not returned.requires_grad:
            # A tensor made in inference mode cannot be in a graph.
            node = (returned.clone() if returned.is_inference() else returned.detach()).requires_grad_()
        self._keep(name, LayerCall(module, convolutions, returned.detach(), node, sample))
        return node.clone()  # an in-place activation must not write to a leaf

    def _keep(self, name: str, call: LayerCall) -> None:
        """Record a call, with the version counters of its inputs and whether an output was changed in place."""
        changed = any(one.output_version != version_of(one.output) for one in call.convolutions)
        call = replace(call, versions=versions_of(call.convolutions), has_changed_output=changed)
        self._calls.setdefault(name, []).append(call)

    def _record_gradients(self) -> None:
        """Let autograd record from now on, even in a user's pass under ``no_grad`` or in inference mode."""
        if self._live:
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
            # Weights that autocast casts from now on are in the graph, so autocast's cache must not keep them.
            self._modes.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            self._functions.weights = self._functions.weights or []
        else:
            torch.set_grad_enabled(True)

    def _leave_tail(self) -> None:
        """Restore the user's modes, and cache the weights that autocast would have cached without the recorder."""
        self._modes.close()
        weights, self._functions.weights = self._functions.weights or [], None
        with torch._C.DisableTorchFunction():
            for weight in weights:
                if torch.is_autocast_enabled(weight.device.type):
                    torch.matmul(weight, weight.new_empty(weight.shape[-1], 0))

    def _before_classifier(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Record the classifier's input. In a user's pass, the graph ends there."""
        self._functions.running.append([])
        given = (*arguments, *keywords.values())
        self._features.append(given[0] if len(given) == 1 else None)
        if not self._live:
            return None
        self._leave_tail()
        detached = [value.detach() if isinstance(value, Tensor) else value for value in given]
        return tuple(detached[: len(arguments)]), dict(zip(keywords, detached[len(arguments) :], strict=True))

    def _after_classifier(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        """Record the classifier's output, and the weight and bias that it applied."""
        self._classifier_weights = _applied(module, self._functions.running.pop())
        if isinstance(returned, Tensor):
            self._classifier_output = returned.detach()


def _applied(module: nn.Module, convolutions: Sequence[Convolution]) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and bias that a module has applied; ``convolutions`` ran inside it.

    If the module has no such parameter, it computes the tensor, e.g. by a parametrization. Then the tensor is taken
    from the convolution. To read the attribute would compute the tensor again, which may write to buffers or draw
    random numbers.
    """
    (one,) = convolutions if len(convolutions) == 1 else (None,)
    computed = {} if one is None else {"weight": one.weight, "bias": one.bias}
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    return computed.get("weight") if weight is None else weight, computed.get("bias") if bias is None else bias


def versions_of(convolutions: tuple[Convolution, ...]) -> tuple[int | None, ...]:
    """Return the version counters of the convolutions' inputs (:func:`version_of`)."""
    return tuple(version_of(one.read) for one in convolutions)


def kernel_sample(kernel: Tensor) -> Tensor:
    """Return a copy of some thousand entries of a kernel.

    The copy shows later whether the kernel was replaced, for example by averaged weights.
    """
    # An active `_FunctionMode` must not record this as a use of the kernel.
    with torch._C.DisableTorchFunction():
        rows = kernel.detach()[:: max(1, kernel.shape[0] // 64)].flatten(1)
        return rows[:, :: max(1, rows.shape[1] // 64)].clone()


class _FunctionMode(TorchFunctionMode):
    """A mode that records the convolutions that run in layers, and the functions that take watched tensors.

    ``watched`` maps the ``id`` of each kernel to the name of its layer. Torch calls the mode for every operation of the
    network. A tensor subclass would cost less time, but users would notice it in ``type``, in their own subclasses and
    in other threads.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.uses: list[tuple[str, str]] = []
        self.running: list[list[Convolution]] = []  # one list for each running layer; layers may be nested
        # In a user's pass, the parameters that CONVOLVING functions take between the first layer and the classifier.
        # Otherwise None.
        self.weights: list[Tensor] | None = None
        self._watched = watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        for argument in (*args, *keywords.values()):
            for tensor in argument if isinstance(argument, (tuple, list)) else (argument,):
                if id(tensor) in self._watched and may_depend(func, tensor, args, result):
                    self.uses.append((self._watched[id(tensor)], getattr(func, "__name__", str(func))))
        if self.weights is not None and func in CONVOLVING:
            self.weights += [one for one in (*args, *keywords.values()) if type(one) is nn.Parameter]
        if self.running and func in CONVOLVING:
            for convolutions in self.running:
                convolutions.append(described(func, result, args, keywords))
        return result


def may_depend(func: Callable[..., Any], tensor: Tensor, arguments: tuple[Any, ...], result: Any) -> bool:
    """Return whether ``result``, which ``func`` returned, may depend on the entries of ``tensor``.

    A shape or a dtype does not depend on them, nor does the result of a function such as ``zeros_like``. Return False,
    too, if ``func`` is a function such as ``to`` that returns the tensor itself.
    """
    name, is_first = getattr(func, "__name__", ""), bool(arguments) and arguments[0] is tensor
    if name in (LIKE_FIRST if is_first else LIKE_OTHER) or func in FREEZING:
        return False
    if isinstance(result, torch.Size) or not (result is None or isinstance(result, (Tensor, tuple, list))):
        return False
    return result is not tensor or name.endswith("_")  # such as mul_ and __imul__
