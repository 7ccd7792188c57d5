"""A forward pass of our own that leaves no trace on the model, its inputs or the random number generators."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from lightning_flatness.capture.generators import generators_kept
from lightning_flatness.errors import LayerSelectionError

HALF = (torch.float16, torch.bfloat16)
WITHOUT_FLOAT64 = ("mps",)


class ModelCopy:
    """Runs a model on copies of its parameters and buffers, made once, as they are now.

    No gradient can reach the user's parameters, and a forward that writes to parameters, buffers or inputs writes to
    copies. The forward is the user's own, called through ``__call__``, so forward hooks run.

    Args:
        model: the module; enter :func:`isolated` around everything done with the copy.
        dtype: to compute in, see :func:`measured`.

    Raises:
        LayerSelectionError: the model is TorchScript or a DataParallel wrapper.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> bool((ModelCopy(model)(torch.ones(3, 2)) == model(torch.ones(3, 2))).all())
        True
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
            raise LayerSelectionError(
                f"The model is a {type(model).__name__} (TorchScript or DataParallel), which cannot be observed; pass "
                "the original module that it was made of."
            )
        self._model = model
        self._dtype = dtype
        self._copies: dict[int, Tensor] = {}
        self._slots: dict[str, int] = {}
        self._buffers: set[int] = set()
        self.keeps_graph = False  # whether the last call left a graph in a buffer
        for prefix, module in model.named_modules():
            tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
            self._buffers |= {id(buffer) for buffer in buffers.values()}
            for name, tensor in (tensors | buffers).items():
                # One copy for each tensor, so that what is tied stays tied.
                self._slots[f"{prefix}.{name}" if prefix else name] = id(tensor)
                if id(tensor) not in self._copies:
                    self._copies[id(tensor)] = measured(tensor.detach(), dtype).clone()

    def copy_of(self, tensor: Tensor) -> Tensor:
        """What the model runs on in place of one of its parameters or buffers."""
        return self._copies[id(tensor)]

    def __call__(
        self,
        inputs: Any,
        replacements: Mapping[nn.Parameter, Tensor] | Mapping[Tensor, Tensor] | None = None,
        written: Collection[Tensor] = (),
    ) -> Any:
        """Call the model on a copy of ``inputs``.

        Args:
            inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword arguments.
            replacements: tensors to use in place of some of the parameters and buffers, wherever the model has them.
            written: buffers whose replacements the forward may write to; of all others it gets a copy in every call.
        """
        inputs = apply_to_collection(inputs, Tensor, lambda tensor: measured(tensor, self._dtype).clone())
        arguments: tuple[Any, ...] = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        keywords: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            arguments, keywords = (), dict(inputs)
        tensors = self._copies | {id(parameter): tensor for parameter, tensor in (replacements or {}).items()}
        begun = self._buffers - {id(buffer) for buffer in written}
        with torch.inference_mode(False):  # they can be in a graph, as the user's can
            tensors |= {key: tensors[key].clone() for key in begun}  # every call begins with the same
        substitutes = {name: tensors[key] for name, key in self._slots.items()}
        # Ties are ours: functional_call would swap a module that has two names twice, and not back.
        output = functional_call(self._model, substitutes, arguments, keywords, tie_weights=False)
        buffers = [name for name, key in self._slots.items() if key in self._buffers]
        self.keeps_graph = any(substitutes[name].requires_grad for name in buffers)
        return output


def _refuse_sharded(name: str, module: nn.Module) -> None:
    wrapped = {"FullyShardedDataParallel", "FSDPModule"} & {base.__name__ for base in type(module).__mro__}
    parameters = list(module.parameters(recurse=False))
    # Tensor parallelism keeps DTensors, DeepSpeed's stage 3 empty parameters with an id; FSDP does not all the time.
    if wrapped or any(type(p.data).__name__ == "DTensor" or hasattr(p, "ds_id") for p in parameters):
        raise LayerSelectionError(
            f"The weights of '{name or type(module).__name__}' are sharded over processes (FSDP, tensor parallelism, "
            "DeepSpeed stage 3), which cannot be measured. Train with strategy='ddp', or load a full checkpoint and "
            "call measure_flatness."
        )


def measured(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in the type and on the device that it is measured in.

    Half precision is measured in float32, since a Hessian of rounded activations says nothing.

    Args:
        tensor: any.
        dtype: of floating point numbers; by default their own, at least float32.

    Example:
        >>> measured(torch.ones(2, dtype=torch.bfloat16)), measured(torch.tensor([1]), torch.float64)
        (tensor([1., 1.]), tensor([1]))
    """
    tensor = tensor.to(measuring_device(tensor.device))
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype or (torch.float32 if tensor.dtype in HALF else tensor.dtype))


def measuring_device(device: torch.device) -> torch.device:
    """Where a model on this device is measured: there, or, if there is no float64 to keep sums in, on the CPU.

    Example:
        >>> measuring_device(torch.device("mps"))
        device(type='cpu')
    """
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, full float precision, eager, gradients on; everything is restored on leaving, also on an error.

    Restored: the attributes of every module, ``training`` and backward hooks among them, which do not run meanwhile;
    the random states of torch (CPU and the model's accelerators), numpy and Python. Inference mode and autocast are
    left, ``torch.compile``d parts run uncompiled, TF32 (and bfloat16 for float32 on a CPU) is off.

    Raises:
        LayerSelectionError: the weights are sharded; and, in place of torch's own error, when the model uses gradient
            checkpointing.

    Example:
        >>> model = nn.Dropout().train()
        >>> with isolated(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    for name, module in model.named_modules():
        _refuse_sharded(name, module)
    with ExitStack() as stack:
        stack.enter_context(differentiable(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the other attention kernels have no second derivative
        stack.enter_context(untouched(model))
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, CheckpointError) and "Checkpointing is not compatible" not in str(error):
                raise
            raise LayerSelectionError(
                "The model's forward uses gradient checkpointing in evaluation mode, which cannot be observed. Switch "
                "it off there: checkpoint only `if self.training`."
            ) from error


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on, inference mode left, full float precision; what :func:`isolated` does for arithmetic.

    Example:
        >>> with torch.inference_mode(), differentiable(nn.Identity()):
        ...     torch.ones(1, requires_grad=True).exp().requires_grad
        True
    """
    device_types = {"cpu"} | {device.type for device in accelerators(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_full_float32())
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, whatever else the modes are; attributes and random states as :func:`isolated` leaves them.

    Example:
        >>> model = nn.Dropout().train()
        >>> with untouched(model):
        ...     model.training
        False
    """
    with random_states_kept(model), _evaluation_mode(model):
        yield


@contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch (CPU and the model's accelerators), numpy and Python on leaving.

    Generators that the model holds are restored, too.

    Example:
        >>> with random_states_kept(nn.Identity()):
        ...     inside = torch.rand(())
        >>> bool(inside == torch.rand(()))
        True
    """
    numpy = sys.modules.get("numpy")  # user code can draw from numpy only if it was imported
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    devices = accelerators(model)
    with ExitStack() as stack:
        stack.enter_context(generators_kept(model))
        for device_type in {device.type for device in devices} or {"cuda"}:
            alike = [device for device in devices if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(alike, device_type=device_type))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def accelerators(model: nn.Module) -> list[torch.device]:
    """The devices other than the CPU that a model is on, in order.

    Example:
        >>> accelerators(nn.Linear(2, 1))
        []
    """
    if not _any_accelerator():  # going through all tensors takes a millisecond
        return []
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.device.type != "cpu"}, key=str)


@cache
def _any_accelerator() -> bool:
    return torch.accelerator.is_available()  # looks for libraries each time


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without backward hooks; every attribute of every module is put back on leaving.

    Attributes that are tensors or lists are copies meanwhile, so that a metric that a forward updates is not.
    """
    # The flags are set one by one: ``model.eval()`` would run the user's own ``train()`` overrides. Backward hooks are
    # put aside, as one that changes gradients would change the derivatives; torch has no public way to do that.
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    try:
        for module, attributes in zip(modules, before, strict=True):
            module.training = False
            for name, value in attributes.items():
                if name in BACKWARD_HOOKS and value:
                    vars(module)[name] = OrderedDict()
                elif type(value) is list:
                    vars(module)[name] = list(value)
                elif isinstance(value, Tensor):
                    with torch.inference_mode(value.is_inference()):
                        vars(module)[name] = value.detach().clone()
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            now = vars(module)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)


BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 as it is, not in TF32 or bfloat16 inside: their few bits are errors of 1e-3 in the layer's output."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; reading the older names there may raise
        owners: list[Any] = [backends.cuda.matmul, backends.mkldnn.matmul]  # type: ignore[attr-defined]
        owners += [backends.cudnn.conv, backends.mkldnn.conv]  # type: ignore[attr-defined]
        before = [owner.fp32_precision for owner in owners]
        try:
            for owner in owners:
                owner.fp32_precision = "ieee"
            yield
        finally:
            for owner, value in zip(owners, before, strict=True):
                owner.fp32_precision = value
    else:
        precision, of_convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            backends.cudnn.allow_tf32 = of_convolutions
