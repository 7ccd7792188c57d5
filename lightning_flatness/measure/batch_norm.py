"""Measure the distance between BatchNorm's running statistics and the statistics of the data.

The distance is large, for example, if weights were averaged and the running statistics were not updated afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.layers.network import BATCH_NORMS
from lightning_flatness.measure.batches import paired_batches
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import isolated, without_wrapper


def statistics_apart(networks: Mapping[str, nn.Module], batches: Iterable[Any] | None) -> dict[str, float]:
    """Return, for each network by name, the distance of its running statistics from the first batch's statistics.

    The distance is the largest :func:`divergence` of all BatchNorm layers. Networks without BatchNorm are left out. The
    mapping is empty if ``batches`` is None. It is also empty if ``batches`` is an iterator, because reading a batch
    would remove it from the iterator.
    """
    if batches is None or isinstance(batches, Iterator):
        return {}
    found = {}
    for name, network in networks.items():
        network = without_wrapper(network)
        norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
        norms = [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]
        if norms:
            with paired_batches(network, batches) as pairs:
                inputs, _ = next(pairs, (None, None))
            if inputs is not None:
                found[name] = _apart(network, norms, inputs)
    return found


def _apart(network: nn.Module, norms: list[Any], inputs: Any) -> float:
    """Return the largest :func:`divergence` of the BatchNorm layers ``norms`` in a forward pass on ``inputs``."""
    heard: list[float] = []

    def hear(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        heard.append(divergence(arguments[0].detach(), norm.running_mean, norm.running_var, norm.eps))

    with isolated(network), ExitStack() as stack, torch.no_grad():
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(hear).remove)
        ModelCopy(network)(inputs)
    return max(heard, default=0.0)


def divergence(inputs: Tensor, mean: Tensor, variance: Tensor, eps: float) -> float:
    """Return the Kullback-Leibler divergence of inputs from the running statistics, averaged over channels.

    Each channel of the inputs ``(N, C, ...)`` counts as a normal distribution with its own mean and variance. It is
    compared with the normal distribution that has the running ``mean`` and ``variance``, ``(C,)`` each.

    Example:
        >>> divergence(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0]), torch.tensor([1.0]), 0.0)
        0.5
    """
    values = inputs.double().transpose(0, 1).flatten(1)
    ratio = (values.var(1, unbiased=False) + eps) / (variance.double() + eps)
    shift = (values.mean(1) - mean.double()).square() / (variance.double() + eps)
    return float(((ratio - 1 - ratio.log() + shift) / 2).mean())
