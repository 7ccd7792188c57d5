"""Recording one forward pass: the convolutions of the layers, and the input and output of the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.functional import ConvolutionGeometry
from lightning_flatness.model.isolation import float32_is_reduced
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.precision import HALF

# The machine epsilon of TF32, which has ten bits.
REDUCED_EPS = 2.0**-10

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Convolution:
    """One call of ``conv1d``, ``conv2d``, ``conv3d`` or ``linear``, as a convolution.

    Uneven padding is applied to the inputs. A linear layer is a convolution of kernel size one over its tokens, whose
    output has its channels last.
    """

    inputs: Tensor  # (N, C, *spatial), detached
    weight: Tensor  # (S, C/G, *kernel_size)
    geometry: ConvolutionGeometry
    output: Tensor  # (N, S, *output), or (N, *tokens, S)
    channel_dimension: int = 1
    unpadded: Tensor | None = None  # the inputs before uneven padding, if there is some

    @property
    def read(self) -> Tensor:
        """The inputs without padding with zeros, ``(N, C, *spatial)``."""
        return self.inputs if self.unpadded is None else self.unpadded

    def detached(self) -> Convolution:
        """Return the same convolution outside the graph."""
        return replace(self, weight=self.weight.detach(), output=self.output.detach())


@dataclass(frozen=True)
class LayerCall:
    """The record of one call of one layer in a forward pass."""

    module: nn.Module
    convolutions: tuple[Convolution, ...]  # that ran inside the module's forward
    returned: Tensor  # what the module returned, detached
    node: Tensor  # the same values, as the node of the graph that derivatives are taken with respect to
    kernel_sample: Tensor | None = None  # entries of the kernel at that time, in a user's pass

    @property
    def convolution(self) -> Convolution:
        """The convolution of a layer that is certified to have exactly one."""
        return self.convolutions[0]


@dataclass(frozen=True)
class Pass:
    """A recorded forward pass on some samples. Its graph lives as long as this object."""

    inputs: Any  # of the model
    logits: Tensor  # (N, K), that the model returned
    calls: Mapping[str, tuple[LayerCall, ...]]  # by layer, in order
    features: tuple[Any, ...]  # what the classifier was called with, once for every call
    classifier_output: Tensor | None
    kernel_uses: tuple[tuple[str, str], ...]  # layers, and the functions that take their kernel
    eps: float  # machine epsilon of products: that of the logits' type, or of TF32 if the user allows it
    half: torch.dtype | None = None  # the half precision that the layers, the classifier or the logits run in


class Recorder:
    """A context manager that records one forward pass, of ours or, with ``live``, of the user's.

    From the first layer on, the pass builds a graph; values stay the same. Hooks are removed and the grad mode is
    restored at the end of the block, also on an error. In a user's pass the graph is built whatever the modes, but ends
    at the classifier's input, and errors in our hooks are kept in :attr:`failure`. The functions that take one of the
    ``watched`` tensors (by layer name) are recorded.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        classifier: nn.Module | None,
        watched: Mapping[str, Tensor] | None = None,
        live: bool = False,
    ) -> None:
        self.failure: Exception | None = None
        self.has_classifier = classifier is not None  # the graph of a live pass ends at it
        self._layers, self._classifier, self._live = layers, classifier, live
        self._calls: dict[str, list[LayerCall]] = {}
        self._features: list[Any] = []
        self._classifier_output: Tensor | None = None
        self._reduced: set[str] = set()  # devices on which the user lets float32 run in TF32
        self._functions = _FunctionMode({id(tensor): name for name, tensor in (watched or {}).items()})

    @property
    def nodes(self) -> list[Tensor]:
        """The outputs of the layers that have run, in the graph."""
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
        return Pass(inputs, logits, calls, features, self._classifier_output, uses, eps, half)

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
        if self._classifier is not None:
            before = self._quiet(self._before_classifier)
            # In the user's pass it runs before the user's own hooks, which may keep the tensors that they are given.
            handles.append(self._classifier.register_forward_pre_hook(before, prepend=self._live))
            handles.append(self._classifier.register_forward_hook(self._quiet(self._after_classifier)))
        for handle in handles:
            self._open.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._leave_tail()
        torch.set_grad_enabled(self._grad_mode)

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the hook; in the user's forward pass, one that keeps its errors instead of raising them."""
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
        self._functions.running.append([])

    def _after_layer(self, name: str, module: nn.Module, arguments: Any, returned: Any) -> Any:
        convolutions = tuple(self._functions.running.pop())
        sample = kernel_sample(convolutions[0].weight) if self._live and convolutions else None
        if not isinstance(returned, Tensor):
            raise LayerSelectionError(f"Layer '{name}' returns a {type(returned).__name__}, not a tensor.")
        self._record_gradients()
        node = returned
        if not returned.requires_grad:
            # A tensor made in inference mode cannot be in a graph.
            node = (returned.clone() if returned.is_inference() else returned.detach()).requires_grad_()
        call = LayerCall(module, convolutions, returned.detach(), node, sample)
        self._calls.setdefault(name, []).append(call)
        return node.clone()  # an in-place activation must not write to a leaf

    def _record_gradients(self) -> None:
        if self._live:
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
            # What autocast casts now is in the graph, so its cache must not keep it.
            self._modes.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            self._functions.weights = self._functions.weights or []
        else:
            torch.set_grad_enabled(True)

    def _leave_tail(self) -> None:
        """Go back to the user's modes, and have autocast keep the weights that it would have kept in them."""
        self._modes.close()
        weights, self._functions.weights = self._functions.weights or [], None
        with torch._C.DisableTorchFunction():
            for weight in weights:
                if torch.is_autocast_enabled(weight.device.type):
                    torch.matmul(weight, weight.new_empty(weight.shape[-1], 0))

    def _before_classifier(self, module: nn.Module, arguments: Any) -> Any:
        self._features.append(arguments[0] if len(arguments) == 1 else None)
        if not self._live:
            return None
        self._leave_tail()
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)

    def _after_classifier(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        if isinstance(returned, Tensor):
            self._classifier_output = returned.detach()


def kernel_sample(kernel: Tensor) -> Tensor:
    """Return a copy of some thousand entries, which shows if other (e.g. averaged) weights replaced a kernel."""
    # Active function modes must not record this as a use of the kernel.
    with torch._C.DisableTorchFunction():
        rows = kernel.detach()[:: max(1, kernel.shape[0] // 64)].flatten(1)
        return rows[:, :: max(1, rows.shape[1] // 64)].clone()


class _FunctionMode(TorchFunctionMode):
    """A mode that records the convolutions that run in any module, and the functions that take watched tensors.

    It is called for every operation of the network. A tensor subclass would cost less, but users would notice it: in
    ``type``, in their own subclasses, in other threads.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.uses: list[tuple[str, str]] = []
        self.running: list[list[Convolution]] = []  # of the layers that run: a recorded layer may hold another
        self.weights: list[Tensor] | None = None  # that convolve in the tail of a user's pass
        self._watched = watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        for argument in (*args, *keywords.values()):
            for tensor in argument if isinstance(argument, (tuple, list)) else (argument,):
                if id(tensor) in self._watched:
                    self.uses.append((self._watched[id(tensor)], getattr(func, "__name__", str(func))))
        result = func(*args, **keywords)
        if self.weights is not None and func in CONVOLVING:
            self.weights += [one for one in (*args, *keywords.values()) if type(one) is nn.Parameter]
        if self.running and func in CONVOLVING:
            of_func = _linear if func is nn.functional.linear else partial(_convolution, CONVOLVING.index(func))
            for convolutions in self.running:
                convolutions.append(of_func(result, *args, **keywords))
        return result


# Functions that convolve, by the number of spatial dimensions.
CONVOLVING = (nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)


def _convolution(
    dimensions: int,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Convolution:
    def per_dimension(value: int | tuple[int, ...]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dimensions if len(values) == 1 else values

    kernel_size, dilations = tuple(weight.shape[2:]), per_dimension(dilation)
    inputs, unpadded = input.detach(), None
    if padding == "same":  # if the padding is odd, the right side gets one more
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        widths = [width for total in reversed(totals) for width in (total // 2, total - total // 2)]
        inputs = nn.functional.pad(inputs, widths)
        unpadded = input.detach()
    paddings = (0,) * dimensions if isinstance(padding, str) else per_dimension(padding)
    geometry = ConvolutionGeometry(kernel_size, per_dimension(stride), paddings, dilations, groups)
    return Convolution(inputs, weight, geometry, output, unpadded=unpadded)


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Convolution:
    inputs = input.detach()
    tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]) if inputs.ndim > 1 else inputs
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    return Convolution(tokens.mT if inputs.ndim > 1 else tokens, weight, geometry, output, channel_dimension=-1)
