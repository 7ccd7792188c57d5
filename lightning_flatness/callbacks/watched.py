"""Choose the modules whose calls in a step are recorded, and the calls that count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_flatness.callbacks.lightning_imports import LightningModule
from lightning_flatness.model.call import Call, tensors_of
from lightning_flatness.model.generators import parts_of


def eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its submodules, except for submodules within a compiled module."""
    yield module
    if not is_compiled(module) and "_orig_mod" not in dict(module.named_children()):
        for child in module.children():
            yield from eager_modules(child)


def modules_outside(pl_module: LightningModule) -> list[nn.Module]:
    """Return modules that a LightningModule holds in other ways than as submodules, e.g. in a list.

    Leave out modules without weights of their own, such as wrappers of submodules.
    """
    inside, weights = set(pl_module.modules()), set(pl_module.parameters())
    # By `type`, because a weak reference has the class of its module, but cannot be in a set.
    found = [part for part in parts_of(pl_module) if issubclass(type(part), nn.Module) and part not in inside]
    parts = {part for module in found for child in module.children() for part in child.modules()}
    eager = dict.fromkeys(part for module in found if module not in parts for part in eager_modules(module))
    return [module for module in eager if not weights.issuperset(module.parameters())]


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` has compiled a module in place."""
    return vars(module).get("_compiled_call_impl") is not None


def compiled_around(pl_module: LightningModule, part: nn.Module) -> set[nn.Module]:
    """Return the modules that are compiled in place and contain ``part``, without ``part`` itself."""
    return {one for one in pl_module.modules() if one is not part and is_compiled(one) and part in one.modules()}


def weighs_losses(call: Call, output: Any) -> bool:
    """Return whether a call turns losses into one number, like a module that learns how to weigh several losses."""
    try:
        inputs, outputs = tensors_of(call), tensors_of(output)
    except Exception:  # the user's step is running, and must not fail here, whatever the network returns
        return False
    is_number = len(outputs) == 1 and outputs[0].numel() == 1
    return is_number and bool(inputs) and all(tensor.ndim < 2 for tensor in inputs)


def is_watchable(pl_module: LightningModule) -> bool:
    """Return whether the steps of a LightningModule run eagerly, so that calls in them can be recorded."""
    return getattr(pl_module, "_compiler_ctx", None) is None and not torch.compiler.is_compiling()
