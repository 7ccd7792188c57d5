"""A whole copy of a model whose weights FSDP2 (``fully_shard``) has sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

STATE = "__composable_api"  # torch has no public name for it
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def whole_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model with whole weights and without FSDP2; of another model, the model itself.

    This is a collective: call it on every rank. Every rank then holds all weights. Weights that are sharded in another
    way as well stay as they are.
    """
    sharded = [module for module in model.modules() if _is_fully_sharded(module)]
    if not sharded or not all(_is_of_one_mesh(parameter) for parameter in model.parameters()):
        return model
    for module in sharded:
        module.reshard()  # type: ignore[operator]  # weights that are whole at the moment may be out of date
    copies: dict[int, Any] = {}
    for parameter in filter(_is_sharded, model.parameters()):
        with torch.no_grad():
            full: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
        copies[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
    for module in sharded:  # their class refuses deepcopy
        plain: Any = type(module).__mro__[2]  # as torch's own FSDPModule.__new__ finds it
        copies[id(module)] = plain.__new__(plain)
    for module in sharded:
        vars(copies[id(module)]).update(deepcopy(_without_sharding(vars(module)), copies))
    copied: nn.Module = copies[id(model)] if id(model) in copies else deepcopy(model, copies)
    return copied


def _is_fully_sharded(module: nn.Module) -> bool:
    return "FSDPModule" in {base.__name__ for base in type(module).__mro__}


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_of_one_mesh(parameter: Tensor) -> bool:
    """Return whether a parameter is not sharded, or along one dimension of a mesh of processes."""
    return not _is_sharded(parameter) or parameter.device_mesh.ndim == 1  # type: ignore[attr-defined]


def _without_sharding(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's attributes without the hooks and the state of FSDP2."""
    kept = {name: value for name, value in attributes.items() if not name.startswith(STATE)}
    for name in HOOKS:
        hooks = attributes[name].items()
        kept[name] = type(attributes[name])((key, hook) for key, hook in hooks if not _is_of_fsdp(hook))
    return kept


def _is_of_fsdp(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
