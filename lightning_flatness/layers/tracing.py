"""Trace which convolutions and linear maps run in a forward pass, and in which modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_flatness.layers.recording import CONVOLUTIONS, CONVOLVING

LAYERS = (*CONVOLUTIONS, nn.Linear)
UNNAMED = "forward"  # name of a convolution with a computed kernel that the model's own forward calls


@dataclass(frozen=True)
class TracedCall:
    """A call of a layer, i.e. a convolution, a linear layer, or a module of the user's that only applies one kernel."""

    name: str
    input_shape: tuple[int, ...]  # () if the input is not a tensor
    output_shape: tuple[int, ...]
    convolves: bool  # whether it is a convolution, or a linear map over several positions
    is_linear: bool  # whether it is a linear layer
    has_weight: bool = True  # whether its kernel is its own parameter ``weight``


@dataclass(frozen=True)
class HiddenCall:
    """A convolution or linear map with a trained kernel that ran outside a layer."""

    name: str
    reason: str  # why it cannot be measured
    calls_before: int  # number of earlier calls of layers
    convolves: bool


@dataclass(frozen=True)
class Trace:
    """The layers that ran in a forward pass, in order, and other modules that applied a trained kernel."""

    output: Any  # what the forward returned
    calls: tuple[TracedCall, ...]
    passed_over: Mapping[str, str]  # name of another module -> why it cannot be measured
    hidden: tuple[HiddenCall, ...]
    last: Tensor | None  # the output of the last call; None if there was no call


@dataclass(eq=False)
class _Applied:
    """One call of a function that convolves or is linear."""

    owner: tuple[str, str] | None  # module and name of the parameter that is the kernel; None for a computed kernel
    module: str  # name of the innermost module that ran
    trained: bool  # whether the kernel is a parameter, or may be computed from one
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    is_linear: bool
    calls_before: int = 0  # number of calls of layers before this one
    in_layer: bool = False  # whether it is part of a TracedCall

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution, or a linear map over several positions."""
        return not self.is_linear or _has_positions(self.output_shape)


@dataclass(eq=False)
class _Frame:
    """A module that is running."""

    name: str
    applied: list[_Applied] = field(default_factory=list)  # the calls inside the module
    output: Tensor | None = None  # output of the latest of these calls that is not in a submodule


def _has_positions(output_shape: tuple[int, ...]) -> bool:
    """Return whether the output of a linear map, channels last, has several positions (tokens) for every sample."""
    return len(output_shape) > 2 and prod(output_shape[1:-1]) > 1


def trace(model: nn.Module, modules: Mapping[str, nn.Module], forward: Callable[[], Any]) -> Trace:
    """Run ``forward`` once, and return which layers ran. ``modules`` are the model's modules, keyed by plain name."""
    mode = _Tracing(modules)
    handles = []
    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(partial(mode.enter_module, name)))
            handles.append(module.register_forward_hook(partial(mode.leave_module, name), always_call=True))
    try:
        with mode:
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    ran = {call.name for call in mode.calls}
    passed_over: dict[str, str] = {}
    hidden: list[HiddenCall] = []
    for applied in mode.applied:
        name, reason = _why_hidden(applied, modules)
        if applied.in_layer or not applied.trained or name in ran:
            continue
        passed_over.setdefault(name, reason)
        hidden.append(HiddenCall(name, reason, applied.calls_before, applied.convolves))
    return Trace(output, tuple(mode.calls), passed_over, tuple(hidden), mode.last)


def _why_hidden(applied: _Applied, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return a name for a convolution or linear map that ran outside a layer, and why it cannot be measured."""
    owner, parameter = applied.owner or (applied.module, "")
    if owner and isinstance(modules[owner], LAYERS):
        return owner, (
            f"Layer '{owner}': its weight is applied without calling the layer (by layer.forward(x), or by a function "
            "that takes the weight), which no hook sees. To measure the layer, call it: layer(x)."
        )
    what = "linear map" if applied.is_linear else "convolution"
    named = f"Module '{owner}'" if owner else "The model"
    return owner or parameter or UNNAMED, (
        f"{named}: its forward applies a {what} of its own and does more than that. To measure the {what}, put it into "
        "an nn.Module whose forward returns its output."
    )


class _Tracing(TorchFunctionMode):
    """A mode that notes calls of functions that convolve or are linear, and the modules that make these calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: list[TracedCall] = []
        self.applied: list[_Applied] = []
        self.last: Tensor | None = None  # what the latest of these calls returned
        self._modules = modules
        self._frames: list[_Frame] = []
        self._owners: dict[int, tuple[str, str]] = {}
        self._buffers: set[int] = set()

    def enter_module(self, name: str, module: nn.Module, arguments: Any) -> None:
        """Note that a module begins to run."""
        self._frames.append(_Frame(name))

    def leave_module(self, name: str, module: nn.Module, arguments: Any, returned: Any) -> None:
        """Note that a module has run; if it is a layer, add its call to ``calls``."""
        frame = self._frames.pop()
        if returned is None:  # the module raised an error, which the forward may catch
            return
        if isinstance(module, LAYERS):
            output_shape = _shape(returned)
            convolves = isinstance(module, CONVOLUTIONS) or _has_positions(output_shape)
            self.calls.append(
                TracedCall(
                    name,
                    _shape(arguments[0] if arguments else None),
                    output_shape,
                    convolves,
                    isinstance(module, nn.Linear),
                )
            )
        elif name and len(frame.applied) == 1 and _is_layer(frame, frame.applied[0], returned):
            (applied,) = frame.applied
            has_weight = applied.owner == (name, "weight")
            shapes = applied.input_shape, applied.output_shape
            self.calls.append(TracedCall(name, *shapes, applied.convolves, applied.is_linear, has_weight))
        else:
            return
        self.last = returned if isinstance(returned, Tensor) else None
        for applied in frame.applied:
            applied.in_layer = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONVOLVING and isinstance(result, Tensor):
            self._note(result, *_operands(*args, **(kwargs or {})), func is nn.functional.linear)
        return result

    def _note(self, output: Tensor, inputs: Tensor, kernel: Tensor, is_linear: bool) -> None:
        """Note one call of a function that convolves or is linear."""
        if not self._owners:  # only now, since modules hold these tensors only while the model runs
            for name, module in self._modules.items():
                self._owners |= {id(tensor): (name, key) for key, tensor in module._parameters.items()}
                self._buffers |= {id(tensor) for tensor in module._buffers.values()}
        owner, innermost = self._owners.get(id(kernel)), self._frames[-1].name if self._frames else ""
        shapes = tuple(inputs.shape), tuple(output.shape)
        trained = owner is not None or self._may_be_trained(kernel, self._modules[innermost])
        applied = _Applied(owner, innermost, trained, *shapes, is_linear, calls_before=len(self.calls))
        self.applied.append(applied)
        for frame in self._frames:
            frame.applied.append(applied)
        if self._frames:
            self._frames[-1].output = output

    def _may_be_trained(self, kernel: Tensor, module: nn.Module) -> bool:
        """Return whether a kernel that is not a parameter may be computed from one of the module's parameters.

        A fixed filter, such as a blur, is not computed from a parameter.
        """
        return id(kernel) not in self._buffers and any(p.numel() == kernel.numel() for p in module.parameters())


def _operands(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Return the inputs and the kernel of a function; the arguments have the names of torch's functions."""
    return input, weight


def _is_layer(frame: _Frame, applied: _Applied, returned: Any) -> bool:
    """Return whether a module is a layer.

    A layer returns the output of ``applied``, and the kernel of this call is its own parameter or computed.
    """
    its_own = applied.trained and (applied.owner is None or applied.owner[0] == frame.name)
    if not its_own or frame.output is None or not isinstance(returned, Tensor) or returned.shape != frame.output.shape:
        return False
    return returned is frame.output or returned.data_ptr() == frame.output.data_ptr()


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor; ``()`` for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()
