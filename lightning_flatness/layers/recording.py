"""Recording one forward pass: what layers convolve or multiply, and what the classifier reads and returns.

A :class:`Recorder` only listens. Who calls the model, and in which modes, is not its business. What it has recorded is
a frozen :class:`Pass`, the same for a forward pass of ours and for one of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.functional import ConvolutionGeometry
from lightning_flatness.model.isolation import float32_is_reduced
from lightning_flatness.model.logits import logits_of

# The rounding of TF32, which has ten bits.
REDUCED_EPS = 2.0**-10

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Convolution:
    """One call of ``conv1d``, ``conv2d``, ``conv3d`` or ``linear``, as a convolution.

    Uneven padding is made explicit. A linear layer is a convolution of kernel size one over its tokens, with channels
    last in its output.
    """

    inputs: Tensor  # (N, C, *spatial), detached
    weight: Tensor  # (S, C/G, *kernel_size)
    geometry: ConvolutionGeometry
    output: Tensor  # (N, S, *output), or (N, *tokens, S)
    channel_dimension: int = 1


@dataclass(frozen=True)
class LayerCall:
    """What one layer did in one of its calls in a forward pass."""

    module: nn.Module
    convolutions: tuple[Convolution, ...]  # that ran inside the module's forward
    returned: Tensor  # what the module returned, detached
    node: Tensor  # the same values, as the node of the graph that derivatives are taken with respect to
    kernel_sample: Tensor | None = None  # of the kernel at that time, in a forward pass of the user's

    @property
    def convolution(self) -> Convolution:
        """The one convolution of a layer that is certified to have one."""
        return self.convolutions[0]


@dataclass(frozen=True)
class Pass:
    """One recorded forward pass on some samples. Its graph lives as long as this does."""

    inputs: Any  # of the model
    logits: Tensor  # (N, K), that the model returned
    calls: Mapping[str, tuple[LayerCall, ...]]  # by layer, in order
    features: tuple[Any, ...]  # what the classifier was called with, once for every call
    classifier_output: Tensor | None
    kernel_uses: tuple[tuple[str, str], ...]  # layers, and the functions that take their kernel
    eps: float  # the rounding of products: of the logits' type, or more where the user lets float32 run in TF32


class Recorder:
    """Hooks on some layers and on the classifier, for the time of a ``with`` block around one forward pass.

    From the first layer on, gradients are recorded. The values that the model sees stay the same. Hooks and grad mode
    are restored on leaving, also on an error. In a forward pass of the user's (``live``) gradients are recorded up to
    the classifier's input only, whatever the modes, and an error of a hook is kept in :attr:`failure`.

    Args:
        layers: to record, by name.
        classifier: the linear map on pooled features, or None when the model's output is the pooled layer itself.
        watched: tensors whose uses are recorded, by the name of a layer.
        live: the forward pass is the user's.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> x = torch.randn(4, 1, 8)
        >>> with Recorder({"0": model[0]}, model[3]) as recorder:
        ...     logits = model(x)
        >>> recorded = recorder.result(x, logits)
        >>> recorded.features[0].shape, recorded.calls["0"][0].node.shape
        (torch.Size([4, 2]), torch.Size([4, 2, 6]))
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        classifier: nn.Module | None,
        watched: Mapping[str, Tensor] | None = None,
        live: bool = False,
    ) -> None:
        self.failure: Exception | None = None
        self._layers, self._classifier, self._live = layers, classifier, live
        self._calls: dict[str, list[LayerCall]] = {}
        self._features: list[Any] = []
        self._classifier_output: Tensor | None = None
        self._kernel_uses: list[tuple[str, str]] = []
        self._watched = {id(tensor): name for name, tensor in (watched or {}).items()}
        self._reduced: set[str] = set()  # devices on which the user lets float32 run in TF32
        self._running: list[_ConvolutionMode] = []  # a stack: one recorded layer may hold another

    @property
    def nodes(self) -> list[Tensor]:
        """The outputs of the layers that have run, in the graph."""
        return [call.node for calls in self._calls.values() for call in calls]

    @property
    def has_classifier(self) -> bool:
        """Whether the graph ends at a classifier."""
        return self._classifier is not None

    def result(self, inputs: Any, output: Any) -> Pass:
        """What was recorded of a forward pass on ``inputs`` that returned ``output``.

        Raises:
            BatchError: the output has no logits ``(N, K)``, or they are not finite.
        """
        logits = logits_of(output)
        reduced = logits.device.type in self._reduced and logits.dtype == torch.float32
        return Pass(
            inputs=inputs,
            logits=logits,
            calls={name: tuple(calls) for name, calls in self._calls.items()},
            features=tuple(self._features),
            classifier_output=self._classifier_output,
            kernel_uses=tuple(self._kernel_uses),
            eps=REDUCED_EPS if reduced else torch.finfo(logits.dtype).eps,
        )

    def __enter__(self) -> Recorder:
        if self._live:
            self._reduced = {kind for kind in ("cpu", "cuda") if float32_is_reduced(torch.device(kind))}
        self._grad_mode = torch.is_grad_enabled()
        self._modes, self._open = ExitStack(), ExitStack()
        self._open.enter_context(_UseMode(self._watched, self._kernel_uses))
        for name, module in self._layers.items():
            self._hook(module.register_forward_pre_hook(self._quiet(self._before_layer)))
            self._hook(module.register_forward_hook(self._quiet(self._after_layer(name))))
        if self._classifier is not None:
            before = self._quiet(self._before_classifier)
            # In the user's pass before hooks of their own, which may keep what they see.
            self._hook(self._classifier.register_forward_pre_hook(before, prepend=self._live))
            self._hook(self._classifier.register_forward_hook(self._quiet(self._after_classifier)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._running:
            self._stop_recording()
        self._open.close()
        self._modes.close()
        torch.set_grad_enabled(self._grad_mode)

    def _hook(self, handle: Any) -> None:
        self._open.callback(handle.remove)

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """In the user's forward pass an error of ours must not be theirs."""
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
        self._running.append(_ConvolutionMode())
        self._running[-1].__enter__()  # type: ignore[no-untyped-call]

    def _stop_recording(self) -> tuple[Convolution, ...]:
        mode = self._running.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return tuple(mode.convolutions)

    def _after_layer(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, arguments: Any, returned: Any) -> Any:
            convolutions = self._stop_recording()
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

        return hook

    def _record_gradients(self) -> None:
        if self._live:
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
        else:
            torch.set_grad_enabled(True)

    def _before_classifier(self, module: nn.Module, arguments: Any) -> Any:
        self._features.append(arguments[0] if len(arguments) == 1 else None)
        if not self._live:
            return None
        self._modes.close()
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)

    def _after_classifier(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        if isinstance(returned, Tensor):
            self._classifier_output = returned.detach()


def kernel_sample(kernel: Tensor) -> Tensor:
    """A copy of some thousand entries, to recognise a kernel by: averaged weights may stand in for it for a while.

    Example:
        >>> kernel_sample(torch.zeros(256, 1000)).shape
        torch.Size([64, 67])
    """
    # The function modes that are on would take it for a use of the kernel.
    with torch._C.DisableTorchFunction():
        rows = kernel.detach()[:: max(1, kernel.shape[0] // 64)].flatten(1)
        return rows[:, :: max(1, rows.shape[1] // 64)].clone()


class _ConvolutionMode(TorchFunctionMode):
    """Records the convolutions that run, whatever the module around them calls its padding or its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[Convolution] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        dimensions = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}.get(func)
        if dimensions is not None:
            self.convolutions.append(_convolution(dimensions, result, *args, **(kwargs or {})))
        elif func is nn.functional.linear:
            self.convolutions.append(_linear(result, *args, **(kwargs or {})))
        return result


class _UseMode(TorchFunctionMode):
    """Records which functions take certain tensors.

    It is called with every operation of the network. (A class of their own for these tensors would cost less, but users
    would see it: in ``type``, in other classes of tensors, from other threads.)
    """

    def __init__(self, names: Mapping[int, str], uses: list[tuple[str, str]]) -> None:
        super().__init__()
        self._names = names
        self._uses = uses

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if id(argument) in self._names:
                self._record(func, argument)
            elif isinstance(argument, (tuple, list)):
                for tensor in argument:
                    if id(tensor) in self._names:
                        self._record(func, tensor)
        return func(*args, **kwargs) if kwargs else func(*args)

    def _record(self, func: Callable[..., Any], tensor: Tensor) -> None:
        self._uses.append((self._names[id(tensor)], getattr(func, "__name__", str(func))))


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
    def per_dimension(value: int | Iterable[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dimensions if len(values) == 1 else values

    kernel_size, dilations = tuple(weight.shape[2:]), per_dimension(dilation)
    inputs = input.detach()
    if padding == "same":  # the odd one goes to the right
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        widths = [width for total in reversed(totals) for width in (total // 2, total - total // 2)]
        inputs = nn.functional.pad(inputs, widths)
    paddings = (0,) * dimensions if isinstance(padding, str) else per_dimension(padding)
    geometry = ConvolutionGeometry(kernel_size, per_dimension(stride), paddings, dilations, groups)
    return Convolution(inputs, weight, geometry, output)


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Convolution:
    inputs = input.detach()
    tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]) if inputs.ndim > 1 else inputs
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    return Convolution(tokens.mT if inputs.ndim > 1 else tokens, weight, geometry, output, channel_dimension=-1)
