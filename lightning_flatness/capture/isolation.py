"""A forward pass of our own that leaves no trace on the model, its inputs or the random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, full float precision, eager, gradients on; everything is restored on leaving, also on an error.

    Restored: every module's ``training`` flag, the random states of torch (CPU and the model's GPUs), numpy and Python.
    Inference mode and autocast are left, ``torch.compile``d parts run uncompiled, TF32 is off. Together with
    :func:`call_model`, which runs the model on copies, nothing of the user's is written to.

    Example:
        >>> model = nn.Dropout().train()
        >>> with isolated(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    device_types = {"cpu"} | {device.type for device in _accelerators(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(random_states_kept(model))
        if "cuda" in device_types:
            stack.enter_context(_full_float32())
        stack.enter_context(_evaluation_mode(model))
        yield


@contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch (CPU and the model's accelerators), numpy and Python on leaving.

    Example:
        >>> with random_states_kept(nn.Identity()):
        ...     inside = torch.rand(())
        >>> bool(inside == torch.rand(()))
        True
    """
    numpy = sys.modules.get("numpy")  # user code can draw from numpy only if it was imported
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    accelerators = _accelerators(model)
    with ExitStack() as stack:
        for device_type in {device.type for device in accelerators} or {"cuda"}:
            devices = [device for device in accelerators if device.type == device_type]
            stack.enter_context(torch.random.fork_rng(devices, device_type=device_type))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def call_model(model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
    """Call the model on a copy of ``inputs``, with detached parameters and copied buffers.

    No gradient can reach the user's parameters, and a forward that writes to its buffers or inputs writes to copies.

    Args:
        model: the module; its forward is called through ``__call__``, so its hooks run.
        inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword arguments.
        parameters: tensors to use in place of some of the parameters, by name.

    Returns:
        What the model returns.

    Example:
        >>> call_model(nn.Identity(), torch.ones(2))
        tensor([1., 1.])
    """
    substitutes: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    substitutes |= {name: b.detach().clone() for name, b in model.named_buffers()}
    substitutes |= parameters or {}
    inputs = apply_to_collection(inputs, Tensor, torch.clone)
    if isinstance(inputs, Mapping):
        return functional_call(model, substitutes, (), dict(inputs))
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return functional_call(model, substitutes, arguments)


def _accelerators(model: nn.Module) -> list[torch.device]:
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.device.type != "cpu"}, key=str)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # The flags are set one by one: ``model.eval()`` would run the user's own ``train()`` overrides.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch TF32 off: its ten bits of mantissa are an error of 1e-3 in the layer's output."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    owners: list[tuple[Any, str, Any]]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later; reading the older names there may raise
        owners = [(owner, "fp32_precision", "ieee") for owner in (matmul, getattr(cudnn, "conv"))]  # noqa: B009
    else:
        owners = [(owner, "allow_tf32", False) for owner in (matmul, cudnn)]
    before = [getattr(owner, name) for owner, name, _ in owners]
    try:
        for owner, name, value in owners:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(owners, before, strict=True):
            setattr(owner, name, value)
