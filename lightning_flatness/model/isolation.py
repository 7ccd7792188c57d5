"""Run a block of code, and then restore the model, its attributes and the random number generators."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from lightning_flatness.errors import FlatnessError, LayerSelectionError, UnbuiltError
from lightning_flatness.model.attributes import attributes_kept
from lightning_flatness.model.call import only_heard_by
from lightning_flatness.model.generators import generators_kept

FABRIC = "_FabricModule"  # the class of Fabric's wrapper, by name, because only callbacks may import Lightning


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the network inside the wrapper of ``Fabric.setup``, or the model itself if there is no wrapper.

    The wrapper casts inputs, and forbids backward passes that do not go through Fabric.
    """
    if not isinstance(model, nn.Module):
        raise FlatnessError(f"The model is a {type(model).__name__}; give a torch.nn.Module.")
    if type(model).__name__ != FABRIC:
        return model
    for name, module in model.named_modules():
        refuse_sharded(name, module)
    network = model.module
    assert isinstance(network, nn.Module)
    return network


def refuse_sharded(name: str, module: nn.Module) -> None:
    """Raise an error if a module's own weights, not those of its submodules, are sharded over processes."""
    wrapped = {"FullyShardedDataParallel", "FSDPModule"} & {base.__name__ for base in type(module).__mro__}
    parameters = list(module.parameters(recurse=False))
    # Tensor parallelism is recognised by DTensors, DeepSpeed stage 3 by parameters with a ds_id, FSDP by its classes.
    if wrapped or any(type(p.data).__name__ == "DTensor" or hasattr(p, "ds_id") for p in parameters):
        raise LayerSelectionError(
            f"The weights of '{name or type(module).__name__}' are sharded over processes, so they cannot be measured "
            "here. If FSDP2 (fully_shard) has sharded them, use FlatnessCallback, or call the function with sync=True "
            "on every rank. With FSDP1, tensor parallelism or DeepSpeed stage 3, train with strategy='ddp' instead, or "
            "load a full checkpoint and call measure_flatness."
        )


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode, in full precision and with gradients enabled, and restore everything.

    If the model itself is in evaluation mode already, its submodules keep the modes that the user has set. Inside the
    block, inference mode, backward hooks and autocast are disabled. Parts under ``torch.compile`` run uncompiled, and
    float32 products use neither TF32 nor bfloat16. On leaving, also after an error, the attributes of every module
    (:func:`attributes_kept`) and the random states of torch (CPU and the model's accelerators), numpy and Python are
    restored. What the forward changes inside other objects is not restored.
    """
    for name, module in model.named_modules():
        refuse_sharded(name, module)
        for key, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise UnbuiltError(
                    f"'{name}.{key}' has no shape yet (a lazy module); call the model once before it is measured."
                )
        if type(module).__name__ == FABRIC:
            raise LayerSelectionError(
                f"'{name}' is wrapped by Fabric.setup, which casts its inputs and allows backward passes only through "
                "Fabric. Build the model from the module inside the wrapper, `.module`."
            )
    with ExitStack() as stack:
        stack.enter_context(differentiable(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # other attention kernels have no second derivative
        stack.enter_context(untouched(model))
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, CheckpointError) and "Checkpointing is not compatible" not in str(error):
                raise
            raise LayerSelectionError(
                "The model's forward uses gradient checkpointing in evaluation mode, which cannot be observed. Switch "
                "it off in evaluation mode: checkpoint only `if self.training`."
            ) from error


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Enable gradients, disable inference mode and autocast, and use full float32 precision inside the block."""
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
    """Run a block in evaluation mode and without ``torch.compile``; on leaving, restore what :func:`isolated` restores.

    Inside the block, no :class:`Overheard` intercepts calls of modules. Autocast and the grad mode stay as they are.
    """
    with (
        random_states_kept(model),
        _evaluation_mode(model),
        only_heard_by(None),
        torch.compiler.set_stance("force_eager"),  # last, because it takes effect when it is created
    ):
        yield


def random_states_kept(model: nn.Module) -> AbstractContextManager[None]:
    """On leaving, restore the random states of torch (CPU, accelerators), numpy, Python and the model's generators."""
    return states_kept(model, accelerators(model))


@contextmanager
def states_kept(owner: Any, devices: Iterable[torch.device]) -> Iterator[None]:
    """On leaving, restore the random states of torch, numpy, Python and the generators that an object holds.

    Of torch, these are the states of the CPU and of ``devices``.
    """
    numpy = sys.modules.get("numpy")  # without an imported numpy, user code cannot draw from it
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    others = [device for device in devices if device.type != "cpu"]
    with ExitStack() as stack:
        stack.enter_context(generators_kept(owner))
        for device_type in {device.type for device in others} or {"cuda"}:
            alike = [device for device in others if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(alike, device_type=device_type))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def accelerators(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model's parameters and buffers, sorted, without the CPU."""
    if not _any_accelerator():  # saves the millisecond that the loop over all tensors takes
        return []
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.device.type != "cpu"}, key=str)


@cache
def _any_accelerator() -> bool:
    return torch.accelerator.is_available()  # cached, since torch looks for libraries in every call


@contextmanager
def kept_switched(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode inside the block if one of its modules overrides ``train()`` or ``eval()``.

    Such a module may make new submodules whenever its mode changes. With one change for the whole block, all passes
    find the same submodules. A model is left as it is if its modules override neither method, or if the model itself
    is in evaluation mode already.
    """
    with _evaluation_mode(model) if _switches_by_itself(model) else nullcontext():
        yield


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and remove backward hooks; on leaving, restore every attribute of every module.

    If the model itself is in evaluation mode already, its submodules keep their modes. Otherwise, modes change as by
    ``model.eval()``. Inside the block, attributes that are tensors are replaced by copies. So if the forward updates a
    metric in place, the metric has its old value after the block.
    """
    with ExitStack() as stack:
        switches = _switches_by_itself(model)
        if switches:
            stack.enter_context(_tensors_kept(model))
        stack.enter_context(attributes_kept(model.modules()))
        if switches:
            # Without this call, a layer that overrides ``train()`` would compute something else than in validation.
            # Exported modules raise an error: they have only one mode. A layer that makes a module draws its weights.
            with random_states_kept(model), torch.no_grad(), suppress(NotImplementedError):
                model.eval()
        elif model.training:
            for module in model.modules():
                module.training = False
        for module in model.modules():
            # Hooks can change gradients, and so the derivatives. Torch has no public way to remove all hooks.
            vars(module).update({name: OrderedDict() for name in BACKWARD_HOOKS if vars(module).get(name)})
        yield


BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def _switches_by_itself(model: nn.Module) -> bool:
    """Return whether a model is in training mode and some module overrides ``train()`` or ``eval()``."""
    modules = list(model.modules())
    return model.training and any(
        getattr(type(module), name) is not getattr(nn.Module, name) or name in vars(module)
        for module in modules
        for name in ("train", "eval")
    )


@contextmanager
def _tensors_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, give all parameters and buffers that the model has now bit-identical values again.

    For this, all weights are copied. The copies are needed if a layer merges weights for evaluation and splits them
    again for training, because such a layer restores its weights only up to rounding.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = [
        (tensor, tensor.data, tensor.data.clone(), tensor.requires_grad, tensor.grad)
        for tensor in tensors.values()
        if not nn.parameter.is_lazy(tensor)
    ]
    try:
        yield
    finally:
        for tensor, data, values, requires_grad, grad in kept:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if not torch.equal(data, values):
                with torch.inference_mode(data.is_inference()):
                    data.copy_(values)
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad


def float32_is_reduced(device: torch.device) -> bool:
    """Return whether torch's flags allow TF32 or bfloat16 in float32 products on a device.

    On GPUs, torch allows TF32 in convolutions by default.
    """
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        of_gpu = device.type == "cuda"
        owners: list[Any] = (
            [backends.cuda.matmul, backends.cudnn.conv] if of_gpu else [backends.mkldnn.matmul, backends.mkldnn.conv]  # type: ignore[attr-defined]
        )
        return any(owner.fp32_precision not in ("ieee", "none") for owner in owners)
    reduced = torch.get_float32_matmul_precision() != "highest"
    return device.type == "cuda" and (reduced or backends.cudnn.allow_tf32)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 products, because they round a layer's output with errors of about 1e-3."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later, where reading the older names may raise
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
