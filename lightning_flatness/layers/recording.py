"""Observing one forward pass: what layers really convolve or multiply, and how what follows hangs on it.

An :class:`Observation` only listens. Who calls the model, and in which modes, is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.functional import ConvolutionGeometry

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of ``conv1d``, ``conv2d``, ``conv3d`` or ``linear``, as a convolution.

    Padding is made explicit where it is uneven. A linear layer is a convolution of kernel size one over its tokens,
    whose channels come last in its output.
    """

    inputs: Tensor  # (N, C, *spatial), detached
    weight: Tensor  # (S, C/G, *kernel_size)
    geometry: ConvolutionGeometry
    output: Tensor  # (N, S, *output), or (N, *tokens, S)
    channel_dimension: int = 1


@dataclass(frozen=True)
class LayerObservation:
    """What one layer did in the observed forward pass, in one of its calls."""

    module: nn.Module
    calls: list[ConvolutionCall]  # the convolutions that ran inside the module's forward
    returned: Tensor  # what the module returned, detached
    output: Tensor  # the same values, as the node that slopes are taken with respect to
    sample: Tensor | None = None  # of the kernel, as it was in somebody else's forward pass


@dataclass
class Observation:
    """Hooks on some layers and on the classifier, for the time of a ``with`` block around one forward pass.

    From the first layer on, gradients are recorded. The values that the model sees stay the same. Hooks and grad mode
    are restored on leaving, also on an error. In a forward pass that is somebody else's (``live``) gradients are
    recorded up to the classifier's input only, whatever the modes, and no error of ours is raised.

    Args:
        layers_to_observe: the layers, by name.
        classifier: the linear map on pooled features, or None when the model's output is the pooled layer itself.
        watched: tensors whose uses are recorded, by the name of a layer.
        live: the forward pass is somebody else's.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> with Observation({"0": model[0]}, model[3]) as seen:
        ...     logits = model(torch.randn(4, 1, 8))
        >>> seen.features[0].shape, seen.layers["0"][0].output.shape
        (torch.Size([4, 2]), torch.Size([4, 2, 6]))
    """

    layers_to_observe: Mapping[str, nn.Module]
    classifier: nn.Module | None
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    live: bool = False
    layers: dict[str, list[LayerObservation]] = field(default_factory=dict)  # an entry for every call
    features: list[Any] = field(default_factory=list)  # g, (N, m), in the graph of the layers' outputs
    classifier_output: Tensor | None = None
    uses: list[tuple[str, str]] = field(default_factory=list)  # layers and the functions that take their tensor
    failure: Exception | None = None  # of a live observation

    def __enter__(self) -> Observation:
        self._grad_mode = torch.is_grad_enabled()
        self._modes = ExitStack()
        self._watch = _UseRecorder({id(tensor): name for name, tensor in self.watched.items()}, self.uses)
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._recorders: list[_ConvolutionRecorder] = []  # a stack: one observed layer may hold another
        self._handles: list[RemovableHandle] = []
        for name, module in self.layers_to_observe.items():
            self._handles.append(module.register_forward_pre_hook(self._quiet(self._before_layer)))
            self._handles.append(module.register_forward_hook(self._quiet(self._after_layer(name))))
        if self.classifier is not None:
            hook = self._quiet(self._before_classifier)
            # In somebody else's pass before their own hooks, which may keep what they see.
            self._handles.append(self.classifier.register_forward_pre_hook(hook, prepend=self.live))
            self._handles.append(self.classifier.register_forward_hook(self._quiet(self._after_classifier)))
        return self

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """In somebody else's forward pass an error of ours must not be theirs."""
        if not self.live:
            return hook

        def quiet(*arguments: Any) -> Any:
            try:
                return hook(*arguments)
            except Exception as error:
                self.failure = error
                self._modes.close()
                return None

        return quiet

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        while self._recorders:
            self._stop_recording()
        self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._modes.close()
        torch.set_grad_enabled(self._grad_mode)

    def _before_layer(self, module: nn.Module, arguments: Any) -> None:
        self._recorders.append(_ConvolutionRecorder())
        self._recorders[-1].__enter__()  # type: ignore[no-untyped-call]

    def _after_layer(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, arguments: Any, returned: Any) -> Any:
            calls = self._stop_recording()
            sample = kernel_sample(calls[0].weight) if self.live and calls else None
            if not isinstance(returned, Tensor):
                raise LayerSelectionError(f"Layer '{name}' returns a {type(returned).__name__}, not a tensor.")
            self._record_gradients()
            output = returned
            if not returned.requires_grad:
                # What was made in inference mode can be in no graph.
                output = (returned.clone() if returned.is_inference() else returned.detach()).requires_grad_()
            self.layers.setdefault(name, []).append(LayerObservation(module, calls, returned.detach(), output, sample))
            return output.clone()  # an in-place activation must not write to a leaf

        return hook

    def _record_gradients(self) -> None:
        if self.live:
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
        else:
            torch.set_grad_enabled(True)

    def _stop_recording(self) -> list[ConvolutionCall]:
        recorder = self._recorders.pop()
        recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return recorder.calls

    def _before_classifier(self, module: nn.Module, arguments: Any) -> Any:
        self.features.append(arguments[0] if len(arguments) == 1 else None)
        if not self.live:
            return None
        self._modes.close()
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)

    def _after_classifier(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        if isinstance(returned, Tensor):
            self.classifier_output = returned.detach()


def kernel_sample(kernel: Tensor) -> Tensor:
    """A copy of some thousand entries, to know a kernel again by: it may be another one (averages?) for a while.

    Example:
        >>> kernel_sample(torch.zeros(256, 1000)).shape
        torch.Size([64, 67])
    """
    # The function modes that are on would take it for a use of the kernel.
    with torch._C.DisableTorchFunction():
        some = kernel.detach()[:: max(1, kernel.shape[0] // 64)].flatten(1)
        return some[:, :: max(1, some.shape[1] // 64)].clone()


class _ConvolutionRecorder(TorchFunctionMode):
    """Records the convolutions that run, whatever the module around them calls its padding or its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ConvolutionCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        dimensions = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}.get(func)
        if dimensions is not None:
            self.calls.append(_convolution_call(dimensions, result, *args, **(kwargs or {})))
        elif func is nn.functional.linear:
            self.calls.append(_linear_call(result, *args, **(kwargs or {})))
        return result


class _UseRecorder(TorchFunctionMode):
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


def _convolution_call(
    dimensions: int,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> ConvolutionCall:
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
    return ConvolutionCall(inputs, weight, geometry, output)


def _linear_call(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> ConvolutionCall:
    inputs = input.detach()
    tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]) if inputs.ndim > 1 else inputs
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    return ConvolutionCall(tokens.mT if inputs.ndim > 1 else tokens, weight, geometry, output, channel_dimension=-1)
