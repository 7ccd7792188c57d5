"""Copy a model whose weights FSDP2 (``fully_shard``) has sharded over processes.

The copy has whole weights, which means that every process holds all entries of every weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional.conditions import same_values

STATE = "__composable_api"  # torch has no public name for it
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
SHARED = ("_trainer", "_fabric", "_device_mesh")  # attributes of a LightningModule that its copy shares with it


def whole_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model with whole weights and without FSDP2.

    If FSDP2 has sharded no weight, return the model itself. Also return the model itself if the device mesh of some
    weights has several dimensions, as for FSDP2 with tensor parallelism. This is a collective: call it on every rank.
    Every rank then holds all weights.
    """
    return WholeWeights(model).copy_of(model)


class WholeWeights:
    """The current weights of a model that FSDP2 has sharded, gathered from all ranks as whole tensors.

    The object holds no weights, and its ``bool`` is False, if :func:`whole_model` would return the model itself.
    Creating the object is a collective, so create it on every rank. :meth:`copy_of` is not a collective.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[tuple[Tensor, Tensor, nn.Parameter]] = []  # the sharded weight, its _sample, the whole one
        if not _sharded_modules(model) or not all(map(_is_of_one_mesh, model.parameters())):
            return
        _reshard(model)
        with torch.inference_mode(False), torch.no_grad():
            for parameter in filter(is_sharded, model.parameters()):
                full: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
                self._weights.append((parameter, _sample(parameter), nn.Parameter(full, parameter.requires_grad)))

    def __bool__(self) -> bool:
        return bool(self._weights)

    def copy_of(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model, or of one of its submodules, with whole weights.

        If this object holds no weights, or no module in ``model`` is sharded, return ``model`` itself. Raise a
        :class:`FlatnessError` if the weights have changed since this object was created.
        """
        sharded = _sharded_modules(model) if self._weights else []
        if not sharded:
            return model
        _reshard(model)
        if not all(same_values(_sample(parameter), sample) for parameter, sample, _ in self._weights):
            raise FlatnessError(
                "Another callback has changed the weights, which FSDP2 shards, after they were gathered for this "
                "validation. List the other callback before the callback that measures."
            )
        copies: dict[int, Any] = {id(parameter): whole for parameter, _, whole in self._weights}
        for module in model.modules():
            copies |= {id(value): value for name in SHARED if (value := vars(module).get(name)) is not None}
        for module in sharded:  # FSDP2 gives them a class that refuses deepcopy
            plain: Any = type(module).__mro__[2]  # the original class; torch finds it in the same way
            copies[id(module)] = plain.__new__(plain)
        for module in sharded:
            vars(copies[id(module)]).update(deepcopy(_without_sharding(vars(module)), copies))
        copied: nn.Module = copies[id(model)] if id(model) in copies else deepcopy(model, copies)
        return copied


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_fully_sharded(module)]


def _reshard(model: nn.Module) -> None:
    """Drop weights that FSDP2 has gathered for a forward pass, because the gathered weights may be out of date."""
    for module in _sharded_modules(model):
        module.reshard()  # type: ignore[operator]


def _sample(parameter: Tensor) -> Tensor:
    """Return a copy of at most two thousand evenly spaced entries of this rank's part of a sharded weight."""
    part: Tensor = parameter.detach().to_local().flatten()  # type: ignore[attr-defined]
    return part[:: max(1, len(part) // 1000)].clone()


def _is_fully_sharded(module: nn.Module) -> bool:
    return "FSDPModule" in {base.__name__ for base in type(module).__mro__}


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over processes, so that this process has a part of it."""
    return hasattr(tensor, "full_tensor")


def _is_of_one_mesh(parameter: Tensor) -> bool:
    """Return whether a parameter is not sharded, or is sharded over a device mesh with one dimension."""
    return not is_sharded(parameter) or parameter.device_mesh.ndim == 1  # type: ignore[attr-defined]


def _without_sharding(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's attributes without the hooks and the state of FSDP2."""
    kept = {name: value for name, value in attributes.items() if not name.startswith(STATE)}
    for name in HOOKS:
        hooks = attributes[name].items()
        kept[name] = type(attributes[name])((key, hook) for key, hook in hooks if not _is_of_fsdp(hook))
    return kept


def _is_of_fsdp(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
