"""Trace which convolutions and linear maps run in a forward pass, and in which modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from lightning_flatness.layers.convolution import CONVOLUTIONS, CONVOLVING, version_of
from lightning_flatness.layers.owners import Owner, Owners, parameters_of
from lightning_flatness.layers.recording import may_depend
from lightning_flatness.model.logits import logits_of

LAYERS = (*CONVOLUTIONS, nn.Linear)
# The name of a convolution or linear map that the model's own forward applies with a computed kernel.
UNNAMED = "forward"
# Other functions that apply a kernel, by the names that `_name_of` gives them. They cannot be measured.
OTHER_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "deform_conv2d"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
PRODUCTS = {
    *("linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "inner", "multi_dot", "chain_matmul"),
    *("einsum", "tensordot", "bilinear", "vecdot"),
}
DISTANCES = {"cdist", "cosine_similarity", "pairwise_distance"}
BY_ANOTHER = (
    " To measure it, apply it by torch.nn.functional.linear, conv1d, conv2d or conv3d, in an nn.Module whose forward "
    "returns the output."
)


@dataclass(frozen=True)
class TracedCall:
    """A call of a layer. Layers are convolutions, linear layers, and other modules that only apply one kernel."""

    name: str
    input_shape: tuple[int, ...]  # () if the input is not a tensor
    output_shape: tuple[int, ...]
    convolves: bool  # whether the layer is a convolution, or a linear map over several positions
    is_linear: bool  # whether the layer is linear
    kernel: str | None = "weight"  # name of the layer's own parameter that is the kernel; None if there is none


@dataclass(frozen=True)
class HiddenCall:
    """A convolution or linear map with a trained kernel that ran outside a layer."""

    name: str
    reason: str  # why it cannot be measured
    calls_before: int  # number of calls of layers before this one
    convolves: bool


@dataclass(frozen=True)
class Trace:
    """The layers that ran in a forward pass, in order, and other modules that applied a trained kernel.

    If a layer returns the logits, ``calls`` and ``hidden`` end with its call: later calls do not change the logits.
    """

    logits: Tensor  # (N, K), which the forward returned
    ran: tuple[TracedCall, ...]  # all calls of layers
    calls: tuple[TracedCall, ...]
    passed_over: Mapping[str, str]  # name of another module -> why that module cannot be measured
    hidden: tuple[HiddenCall, ...]

    @property
    def names(self) -> list[str]:
        """The names of all layers that ran, in order."""
        return list(dict.fromkeys(call.name for call in self.ran))


@dataclass(eq=False)
class _Applied:
    """One call of a function that applies a kernel: ``conv1d``, ``conv2d``, ``conv3d``, ``linear`` or another one."""

    owner: Owner | None  # of the parameter that is the kernel; None if it is no parameter
    module: str  # name of the innermost module that ran
    trained: bool  # whether the kernel is a parameter, or may be computed from one
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    is_linear: bool
    calls_before: int = 0  # number of calls of layers before this one
    alias_of: Owner | None = None  # owner of a parameter with the kernel's memory, as for `weight.data`
    in_layer: bool = False  # whether the call was made inside a layer
    function: str = ""  # name of the function if it is another one
    vectors: float = 0.0  # of another function, a product: number of vectors that the matrix is multiplied with

    @property
    def convolves(self) -> bool:
        """Whether the call is a convolution, or a linear map over several positions."""
        return not self.is_linear or _has_positions(self.output_shape)


@dataclass(eq=False)
class _Frame:
    """A module whose forward is running."""

    name: str
    applied: list[_Applied] = field(default_factory=list)  # the calls inside the module and its submodules
    output: Tensor | None = None  # output of the latest of these calls that is not in a submodule


def _has_positions(output_shape: tuple[int, ...]) -> bool:
    """Return whether the output of a linear map, channels last, has several positions (tokens) for every sample."""
    return len(output_shape) > 2 and prod(output_shape[1:-1]) > 1


def trace(model: nn.Module, modules: Mapping[str, nn.Module], forward: Callable[[], Any]) -> Trace:
    """Run ``forward`` once, and return which layers ran.

    ``modules`` are the model's modules, keyed by their names without the parts that ``torch.compile`` adds.
    """
    mode = _Tracing(modules)
    handles = []
    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(partial(mode.enter_module, name)))
            leave = partial(mode.leave_module, name)
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):  # takes no hooks of its own
        handles.append(register_module_forward_hook(mode.leave_script))
    try:
        with mode:
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    logits = logits_of(output).detach()
    ran, last = {call.name for call in mode.calls}, mode.last_call(logits)
    passed_over: dict[str, str] = {}
    hidden: list[HiddenCall] = []
    for applied in mode.applied:
        name, reason = _why_hidden(applied, modules)
        if applied.in_layer or not applied.trained or name in ran:
            continue
        passed_over.setdefault(name, reason)
        if last is None or applied.calls_before <= last:
            convolves = applied.convolves or round(applied.vectors) > len(logits)
            hidden.append(HiddenCall(name, reason, applied.calls_before, convolves))
    calls = mode.calls if last is None else mode.calls[: last + 1]
    return Trace(logits, tuple(mode.calls), tuple(calls), passed_over, tuple(hidden))


def _why_hidden(applied: _Applied, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return a name for a convolution or linear map that ran outside a layer, and why it cannot be measured.

    The module that owns the kernel gives the name, or else the innermost module that was running. If that module is the
    model itself, the name is that of the kernel's parameter, or ``UNNAMED`` if there is no such parameter.
    """
    owner, parameter = applied.owner or applied.alias_of or (applied.module, "")
    named = f"Module '{owner}'" if owner else "The model"
    if isinstance(modules[owner], torch.jit.ScriptModule):
        return owner, f"{named} is TorchScript, whose layers no hook sees. To measure them, pass the original module."
    if applied.function in TRANSPOSED:
        return owner or parameter, f"{named}: it applies a transposed convolution, which cannot be measured."
    if owner and isinstance(modules[owner], LAYERS):
        return owner, (
            f"Layer '{owner}': its weight is applied without calling the layer (by layer.forward(x), or by a function "
            "that takes the weight), which no hook sees. To measure the layer, call it: layer(x)."
        )
    if applied.function:
        reason = f"{named}: its parameter '{parameter}' is applied by {applied.function}, which cannot be measured."
        return owner or parameter, reason + BY_ANOTHER * (applied.function not in DISTANCES | {"deform_conv2d"})
    what = "linear map" if applied.is_linear else "convolution"
    return owner or parameter or UNNAMED, (
        f"{named}: its forward applies a {what} of its own and does more than that. To measure the {what}, put it into "
        "an nn.Module whose forward returns its output."
    )


class _Tracing(TorchFunctionMode):
    """A mode that records the calls of functions that apply a kernel, and the modules that make these calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: list[TracedCall] = []
        self.applied: list[_Applied] = []
        # The outputs of one vector for every sample, with their version counters, keyed by index in `calls`.
        self._vectors: dict[int, tuple[Tensor, int | None]] = {}
        self._modules = modules
        self._frozen = {owner for owner, parameter in parameters_of(modules) if not parameter.requires_grad}
        self._frames: list[_Frame] = []
        self._owners = Owners({})
        self._buffers: set[int] = set()
        # Tensors computed from parameters alone, with the owner of the first. They are kept, as Python reuses ids.
        self._computed: dict[int, tuple[Tensor, Owner | None]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tracing:
        """Return a new, empty mode. The hooks of deep-copied modules record in it, not in the original."""
        return _Tracing({})

    def enter_module(self, name: str, module: nn.Module, arguments: Any) -> None:
        """Record that a module begins to run."""
        if not self._frames:  # not earlier, because modules hold the copied tensors only while the model runs
            self._owners = Owners(self._modules)
            self._buffers |= {id(tensor) for one in self._modules.values() for tensor in one._buffers.values()}
        self._frames.append(_Frame(name))

    def leave_module(
        self, name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], returned: Any
    ) -> None:
        """Record that a module has run. If the module is a layer, add its call to ``calls``."""
        frame = self._frames.pop()
        if returned is None:
            return  # the module raised an error, which the forward may catch
        convolving = [applied for applied in frame.applied if not applied.function]
        if isinstance(module, LAYERS):
            shapes = _shape(next(iter((*arguments, *keywords.values())), None)), _shape(returned)
            convolves = isinstance(module, CONVOLUTIONS) or _has_positions(shapes[1])
            self.calls.append(TracedCall(name, *shapes, convolves, isinstance(module, nn.Linear)))
        elif name and len(convolving) == 1 and _is_layer(frame, convolving[0], returned):
            (applied,) = convolving
            shapes, kernel = (applied.input_shape, applied.output_shape), applied.owner[1] if applied.owner else None
            self.calls.append(TracedCall(name, *shapes, applied.convolves, applied.is_linear, kernel))
        else:
            return
        if isinstance(returned, Tensor) and returned.ndim > 1 and set(returned.shape[2:]) <= {1}:
            self._vectors[len(self.calls) - 1] = returned, version_of(returned)
        for applied in frame.applied:
            applied.in_layer = True

    def leave_script(self, module: nn.Module, arguments: tuple[Any, ...], returned: Any) -> None:
        """Record the call of a TorchScript module that has a kernel. No hook sees the layers inside it."""
        name = next((name for name, one in self._modules.items() if one is module), "")
        dimensions = {parameter.ndim for parameter in module.parameters()} - {0, 1}  # of kernels
        if isinstance(module, torch.jit.ScriptModule) and name and dimensions:
            self._add(_Applied((name, ""), name, True, (), _shape(returned), dimensions == {2}, len(self.calls)))

    def last_call(self, logits: Tensor) -> int | None:
        """Return the index in ``calls`` of the last call whose output is the logits, or None if there is no such call.

        The output must be in the memory of the logits, and unchanged. Equal values do not suffice: an adapter that
        starts at zero leaves an output as it is at first, but changes it after some training.
        """
        for index, (output, version) in reversed(self._vectors.items()):
            unchanged = output.shape[:2] == logits.shape and version_of(output) == version
            if unchanged and output.flatten(1).is_set_to(logits):
                return index
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONVOLVING and isinstance(result, Tensor):
            self._note(result, *_operands(*args, **(kwargs or {})), func is nn.functional.linear)
        elif self._frames:
            operands = _tensors_in((*args, *(kwargs or {}).values()))
            self._follow(_name_of(func), [one for one in operands if may_depend(func, one, args, result)], result)
        return result

    def _follow(self, function: str, operands: list[Tensor], result: Any) -> None:
        """Record the call of a function that is no convolution or ``linear``, if it applies or computes a kernel."""
        owners = {id(one): self._owner_of(one) for one in operands}
        kernels = [one for one in operands if owners[id(one)] is not None]
        others = [one for one in operands if owners[id(one)] is None and id(one) not in self._buffers]
        if kernels and not others:
            owner = min((owners[id(one)] for one in kernels), key=self._frozen.__contains__)  # a trained one, if any
            numbers = [one for one in _tensors_in((result,)) if one.is_floating_point() or one.is_complex()]
            self._computed |= {id(one): (one, owner) for one in numbers}
        kernel = max(kernels, key=Tensor.numel, default=result)
        applies = function in PRODUCTS | DISTANCES | OTHER_CONVOLUTIONS | TRANSPOSED and isinstance(result, Tensor)
        if not applies or not kernels or not others or kernel.ndim < 2 or self._is_constant(owners[id(kernel)]):
            return
        # N vectors times a matrix (m, K): N m entries are read, N K returned.
        entries = max(other.numel() for other in others) * result.numel() / max(1, kernel.numel())
        # A single vector, such as a query, is no layer, also where expand() repeats it for every sample.
        steps = kernel.stride() if kernel.layout == torch.strided else kernel.shape
        several = sum(size > 1 and step > 0 for size, step in zip(kernel.shape, steps, strict=True)) > 1
        place, is_product = (owners[id(kernel)], self._frames[-1].name), function in PRODUCTS | DISTANCES
        vectors = entries**0.5 if several and is_product else 0.0
        self._add(_Applied(*place, True, (), (), is_product, len(self.calls), None, False, function, vectors))

    def _owner_of(self, tensor: Tensor) -> Owner | None:
        """Return ``(module name, parameter name)`` if a tensor is a parameter or was computed from one, else None."""
        return self._owners.of(tensor) or self._computed.get(id(tensor), (None, None))[1]

    def _is_constant(self, owner: Owner | None) -> bool:
        """Return whether a parameter is frozen and follows a trained layer, so that it counts as a buffer."""
        return owner in self._frozen and any((call.name, "weight") not in self._frozen for call in self.calls)

    def _add(self, applied: _Applied) -> None:
        """Add a call to the record, and to the modules that are running."""
        self.applied.append(applied)
        for frame in self._frames:
            frame.applied.append(applied)

    def _note(self, output: Tensor, inputs: Tensor, kernel: Tensor, is_linear: bool) -> None:
        """Record one call of a convolution function or of ``linear``."""
        owner, innermost = self._owners.of(kernel), self._frames[-1].name if self._frames else ""
        alias_of = None if owner else self._owners.of_alias(kernel)
        if alias_of and any(call.name == alias_of[0] for call in self.calls):  # a layer that also ran has this name
            alias_of = None
        shapes = tuple(inputs.shape), tuple(output.shape)
        trained = owner is not None or self._may_be_trained(kernel, inputs, self._modules[innermost])
        self._add(_Applied(owner, innermost, trained, *shapes, is_linear, len(self.calls), alias_of))
        if self._frames:
            self._frames[-1].output = output

    def _may_be_trained(self, kernel: Tensor, inputs: Tensor, module: nn.Module) -> bool:
        """Return whether a kernel that is not a parameter may be computed from parameters.

        The kernel must not be a buffer; fixed filters, such as a blur, usually are buffers. It must also be computed
        from parameters alone, or have as many entries as one of the module's parameters, or hold one kernel per sample,
        for a convolution whose groups are the samples.
        """
        computed = id(kernel) in self._computed and not self._is_constant(self._owner_of(kernel))
        per_sample = kernel.ndim > 2 and len(inputs) == 1 and inputs.shape[1] > kernel.shape[1]
        same_size = any(p.numel() == kernel.numel() for p in module.parameters())
        return id(kernel) not in self._buffers and (computed or per_sample or same_size)


def _name_of(func: Callable[..., Any]) -> str:
    """Return a function's plain name, e.g. ``matmul`` for ``Tensor.__matmul__`` and ``torch.ops.aten.matmul``."""
    return getattr(func, "__name__", "").partition(".")[0].strip("_").removeprefix("linalg_")


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values``, including those inside a tuple or list."""
    entries = (value if isinstance(value, (tuple, list)) else (value,) for value in values)
    return [one for entry in entries for one in entry if isinstance(one, Tensor)]


def _operands(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Return the inputs and the kernel of a call. The parameters have torch's names, for calls with keywords."""
    return input, weight


def _is_layer(frame: _Frame, applied: _Applied, returned: Any) -> bool:
    """Return whether a module acts as a layer, i.e. applies one kernel and does nothing after that.

    The module must return the output of ``applied``, the only call of a convolution function or ``linear`` inside it.
    The kernel of that call must be a parameter of the module itself, or be computed from a parameter.
    """
    its_own = applied.trained and (applied.owner is None or applied.owner[0] == frame.name)
    if not its_own or frame.output is None or not isinstance(returned, Tensor) or returned.shape != frame.output.shape:
        return False
    return returned is frame.output or returned.data_ptr() == frame.output.data_ptr()


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor; ``()`` for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()
