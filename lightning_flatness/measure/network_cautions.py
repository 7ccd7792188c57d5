"""Find reasons against comparing networks, in their depths and in their BatchNorm layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_flatness.functional.conditions import same_values
from lightning_flatness.results import Caution, ComparedModel
from lightning_flatness.results.texts import named

# There is a caution for a network if the distance between its running statistics and the statistics of the first batch
# is above FAR_APART, and above TIMES the smallest such distance of all networks. The second condition is needed because
# the first batch may have one class only, which increases the distance in all networks. Distances are those of
# batch_norm.statistics_apart.
FAR_APART, TIMES = 0.25, 4.0


def network_cautions(
    rows: Mapping[str, ComparedModel], networks: Mapping[str, nn.Module], apart: Mapping[str, float]
) -> list[Caution]:
    """Return cautions about the depth of the networks and about BatchNorm.

    ``networks`` holds only the models that were given as modules, and not as reports. ``apart`` maps each model to the
    distance between its running statistics and the statistics of the data (``batch_norm.statistics_apart``).
    """
    counted = {name: row for name, row in rows.items() if row.depth}
    return [*_of_depth(counted), *_of_batch_norm(counted), *_of_misfit(apart), *_of_statistics(networks)]


def _of_depth(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return a caution if networks have different depths."""
    if len({row.depth for row in rows.values()}) < 2:
        return []
    numbers = named(f"{name} {row.depth}" for name, row in rows.items())
    sentence = (
        f"Networks have different numbers of convolutions and linear layers ({numbers}). Depth changes flatness more "
        "than it changes what flatness is used to predict: compare networks of equal depth."
    )
    return [Caution("depth", sentence, tuple(rows))]


def _of_batch_norm(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return cautions if only some networks have BatchNorm, or if running statistics were never updated."""
    found = []
    without = tuple(name for name, row in rows.items() if not row.batch_norms)
    if 0 < len(without) < len(rows):
        sentence = (
            f"Only some networks have BatchNorm ({named(without)} without). BatchNorm changes the scale of features "
            "and weights, and this changes flatness: compare networks that all have BatchNorm, or networks without it."
        )
        found.append(Caution("batch_norm", sentence, without, "only some networks have BatchNorm"))
    fresh = tuple(name for name, row in rows.items() if row.fresh_batch_norms)
    if fresh:
        sentence = (
            f"Statistics of BatchNorm were never updated in {named(fresh)}. Networks are measured with their running "
            "statistics: after averaging weights, update these first (torch.optim.swa_utils.update_bn)."
        )
        words = f"statistics of BatchNorm never updated in {named(fresh)}"
        found.append(Caution("batch_norm", sentence, fresh, words))
    return found


def _of_misfit(apart: Mapping[str, float]) -> list[Caution]:
    """Return a caution if running statistics do not fit the data in some networks, but do fit in others."""
    if len(apart) < 2:
        return []
    least = min(apart.values())
    misfits = tuple(name for name, value in apart.items() if value > FAR_APART and value > TIMES * least)
    if not misfits:
        return []
    these, they = ("this network does", "it") if len(misfits) == 1 else ("these networks do", "they")
    sentence = (
        f"Running statistics of BatchNorm do not fit the data in {named(misfits)}, but they do in other networks. So "
        f"{these} not compute what {they} computed in training. After averaging weights, update the statistics "
        "(torch.optim.swa_utils.update_bn)."
    )
    words = f"statistics of BatchNorm do not fit the data in {named(misfits)}"
    return [Caution("batch_norm", sentence, misfits, words)]


def _of_statistics(networks: Mapping[str, nn.Module]) -> list[Caution]:
    """Return a caution if two networks have the same weights, but different running statistics."""
    names = list(networks)
    pairs = ((one, other) for index, one in enumerate(names) for other in names[index + 1 :])
    alike = next((pair for pair in pairs if _differ_in_statistics(*(networks[name] for name in pair))), None)
    if alike is None:
        return []
    sentence = (
        f"{alike[0]} and {alike[1]} have the same weights; the only difference between them is in the running "
        "statistics of BatchNorm."
    )
    words = f"{alike[0]} and {alike[1]} differ in statistics of BatchNorm alone"
    return [Caution("batch_norm", sentence, alike, words)]


def _differ_in_statistics(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks have the same parameters, but different running statistics of BatchNorm."""
    if one is other or not _statistics(one):
        return False
    return _are_equal(dict(one.named_parameters()), dict(other.named_parameters())) and not _are_equal(
        _statistics(one), _statistics(other)
    )


def _statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return a mapping from names of buffers to the running means and variances of a network."""
    return {name: buffer for name, buffer in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two mappings have the same names and equal tensors, possibly on different devices."""
    if one.keys() != other.keys():
        return False
    return all(same_values(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())
