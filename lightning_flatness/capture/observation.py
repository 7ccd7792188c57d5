"""Observing one forward pass: what a convolution really convolves, and how the classifier's input hangs on it.

An :class:`Observation` only listens. Who calls the model, and in which modes, is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_flatness.errors import LayerSelectionError, NotClosedFormError
from lightning_flatness.functional import ConvolutionGeometry

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of ``torch.conv1d``, ``conv2d`` or ``conv3d``, with its padding made explicit where it is uneven."""

    inputs: Tensor  # (N, C, *spatial), detached
    weight: Tensor  # (S, C/G, *kernel_size)
    geometry: ConvolutionGeometry
    output: Tensor  # (N, S, *output)


@dataclass(frozen=True)
class LayerObservation:
    """What one layer did in the observed forward pass."""

    module: nn.Module
    calls: list[ConvolutionCall]  # the convolutions that ran inside the module's forward
    returned: Tensor  # what the module returned, (N, S, *output), detached
    output: Tensor  # the same values, as the node that slopes are taken with respect to


@dataclass
class Observation:
    """Hooks on some layers and on the classifier, for the time of a ``with`` block around one forward pass.

    From the first layer on, gradients are recorded, up to the classifier's input. The values that the model sees stay
    the same. Hooks and grad mode are restored on leaving, also on an error.

    Args:
        layers: the layers to observe, by name.
        classifier: the linear map on pooled features, or None when the model's output is the pooled layer itself.

    Raises:
        LayerSelectionError: on the call of the model, when a layer or the classifier runs twice.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> with Observation({"0": model[0]}, model[3]) as seen:
        ...     logits = model(torch.randn(4, 1, 8))
        >>> seen.features.shape, seen.layers["0"].output.shape
        (torch.Size([4, 2]), torch.Size([4, 2, 6]))
    """

    layers_to_observe: Mapping[str, nn.Module]
    classifier: nn.Module | None
    layers: dict[str, LayerObservation] = field(default_factory=dict)
    features: Tensor | None = None  # g, (N, m), in the graph of the layers' outputs
    classifier_output: Tensor | None = None

    def __enter__(self) -> Observation:
        self._grad_mode = torch.is_grad_enabled()
        self._recorder: _ConvolutionRecorder | None = None
        self._handles: list[RemovableHandle] = []
        for name, module in self.layers_to_observe.items():
            self._handles.append(module.register_forward_pre_hook(self._before_layer))
            self._handles.append(module.register_forward_hook(self._after_layer(name)))
        if self.classifier is not None:
            self._handles.append(self.classifier.register_forward_pre_hook(self._before_classifier))
            self._handles.append(self.classifier.register_forward_hook(self._after_classifier))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._stop_recording()
        torch.set_grad_enabled(self._grad_mode)

    def _before_layer(self, module: nn.Module, arguments: Any) -> None:
        self._recorder = _ConvolutionRecorder()
        self._recorder.__enter__()  # type: ignore[no-untyped-call]

    def _after_layer(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, arguments: Any, returned: Any) -> Any:
            calls = self._stop_recording()
            if name in self.layers:
                raise LayerSelectionError(
                    f"Layer '{name}' runs more than once in one forward pass, so its Hessian is not that of one "
                    "convolution. Choose another layer with layers=."
                )
            if not isinstance(returned, Tensor):
                raise NotClosedFormError(f"Layer '{name}' returns a {type(returned).__name__}, not a tensor.")
            torch.set_grad_enabled(True)
            detached = returned.detach()
            output = returned if returned.requires_grad else returned.detach().requires_grad_()
            self.layers[name] = LayerObservation(module, calls, detached, output)
            return output.clone()  # an in-place activation must not write to a leaf

        return hook

    def _stop_recording(self) -> list[ConvolutionCall]:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return []
        recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return recorder.calls

    def _before_classifier(self, module: nn.Module, arguments: Any) -> Any:
        if self.features is not None:
            raise LayerSelectionError(
                "The classifier runs more than once in one forward pass; the closed form needs one linear map."
            )
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            raise NotClosedFormError("The classifier is not called with one tensor.")
        self.features = arguments[0]
        torch.set_grad_enabled(self._grad_mode)
        return (arguments[0].detach(),)

    def _after_classifier(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        self.classifier_output = returned.detach()


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
        return result


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
