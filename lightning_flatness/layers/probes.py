"""Estimates from random probes, with their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional import measures_of
from lightning_flatness.layers.options import MEASURES


class BlockTraces(NamedTuple):
    """Block traces of one layer, summed over samples, and what probes leave uncertain of them."""

    total: Tensor  # (G, S/G, S/G), or (G, S/G) for the diagonals, float64
    variances: Tensor | None = None  # (4,), of MEASURES; None for what was not sampled


class Probes:
    """Mean of equally distributed estimates of one layer's block traces, and its variance.

    Args:
        gram: inner products of the layer's filters, ``(G, S/G, S/G)``.

    Example:
        >>> probes = Probes(torch.ones(1, 1, 1))
        >>> probes.add(torch.full((1, 1, 1), 2.0))
        >>> probes.add(torch.full((1, 1, 1), 4.0))
        >>> estimate = probes.estimate()
        >>> estimate.total.item(), estimate.variances[0].item()
        (3.0, 1.0)
    """

    def __init__(self, gram: Tensor) -> None:
        self.count = 0
        self._gram = gram
        self._sum: Tensor | float = 0.0
        self._measures: list[Tensor] = []

    def add(self, block_traces: Tensor) -> None:
        """Take one estimate."""
        self.count += 1
        self._sum = self._sum + block_traces
        self._measures.append(_measures(block_traces, self._gram))

    def estimate(self, known: Tensor | None = None) -> BlockTraces:
        """The mean of the estimates, added to what is ``known`` exactly."""
        mean = torch.as_tensor(self._sum / self.count)
        return BlockTraces(mean if known is None else known + mean, self._variances())

    def precise(self, tolerance: float, known: Tensor | None = None) -> bool:
        """Whether trace and relative flatness have a standard error of ``tolerance`` of themselves at most."""
        sizes = _measures(self.estimate(known).total, self._gram).abs()
        errors = self._variances().sqrt()
        return bool((errors[:2] <= tolerance * sizes[:2]).all())

    def _variances(self) -> Tensor:
        return torch.stack(self._measures).var(0) / self.count


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1, the shape and type of a tensor, from a generator on the CPU.

    Example:
        >>> random_signs(torch.zeros(2, 3), torch.Generator()).abs().sum().item()
        6.0
    """
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def _measures(block_traces: Tensor, gram: Tensor) -> Tensor:
    found = measures_of(block_traces, gram)
    zero = torch.zeros((), dtype=block_traces.dtype, device=block_traces.device)
    return torch.stack([found.get(name, zero) for name in MEASURES])
