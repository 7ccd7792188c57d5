"""What must not be concluded from a comparison, found by looking at the networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_flatness.layers.tracing import LAYERS
from lightning_flatness.results import Caution
from lightning_flatness.results.texts import named

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def network_cautions(networks: Mapping[str, nn.Module]) -> list[Caution]:
    """Return cautions of networks that are compared: depth, and statistics of BatchNorm."""
    return [*_of_depth(networks), *_of_batch_norm(networks)] if networks else []


def _of_depth(networks: Mapping[str, nn.Module]) -> list[Caution]:
    depths = {name: _number(network, LAYERS) for name, network in networks.items()}
    if len(set(depths.values())) == 1:
        return []
    numbers = named(f"{name} {depth}" for name, depth in depths.items())
    sentence = (
        f"Networks have different numbers of convolutions and linear layers ({numbers}). Depth changes flatness more "
        "than it changes what flatness is to tell: compare networks of one depth."
    )
    return [Caution("depth", sentence, tuple(networks))]


def _of_batch_norm(networks: Mapping[str, nn.Module]) -> list[Caution]:
    found = []
    norms = {name: _number(network, BATCH_NORMS) for name, network in networks.items()}
    without = tuple(name for name, number in norms.items() if not number)
    if 0 < len(without) < len(norms):
        sentence = (
            f"Only some networks have BatchNorm ({named(without)} without). It changes the scale of features and "
            "weights, and flatness with it: compare networks that all have it, or none."
        )
        found.append(Caution("batch_norm", sentence, without))
    fresh = tuple(name for name, network in networks.items() if any(map(_is_fresh, network.modules())))
    if fresh:
        sentence = (
            f"Statistics of BatchNorm were never updated in {named(fresh)}. Networks are measured with their running "
            "statistics: after averaging weights, update these first (torch.optim.swa_utils.update_bn)."
        )
        found.append(Caution("batch_norm", sentence, fresh))
    names = list(networks)
    alike = next(
        (
            (a, b)
            for i, a in enumerate(names)
            for b in names[i + 1 :]
            if _differ_in_statistics(networks[a], networks[b])
        ),
        None,
    )
    if alike:
        sentence = (
            f"{alike[0]} and {alike[1]} have the same weights, and other statistics of BatchNorm: what differs is the "
            "statistics alone."
        )
        found.append(Caution("batch_norm", sentence, alike))
    return found


def _number(network: nn.Module, kinds: tuple[type, ...]) -> int:
    return sum(isinstance(module, kinds) for module in network.modules())


def _is_fresh(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm whose running statistics are those that it began with."""
    if not isinstance(module, BATCH_NORMS) or module.running_mean is None or module.running_var is None:
        return False
    return not bool(module.running_mean.any()) and bool((module.running_var == 1).all())


def _differ_in_statistics(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks have the same parameters, and different buffers of the same names."""
    if one is other or not _number(one, BATCH_NORMS):
        return False
    return _are_equal(dict(one.named_parameters()), dict(other.named_parameters())) and not _are_equal(
        _statistics(one), _statistics(other)
    )


def _statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        tensor.shape == other[name].shape and torch.equal(tensor.cpu(), other[name].cpu())
        for name, tensor in one.items()
    )
