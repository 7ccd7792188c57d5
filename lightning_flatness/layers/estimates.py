"""Estimates from random probes, with variances: for sampled classes, and for the residual of the Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightning_flatness.functional import measures_of
from lightning_flatness.layers.cotangents import pull_back
from lightning_flatness.layers.options import MEASURES, Options


class BlockTraces(NamedTuple):
    """Block traces of one layer, summed over samples, and the variances of the measures if probes estimated them."""

    total: Tensor  # (G, S/G, S/G), or (G, S/G) for the diagonals, float64
    variances: Tensor | None = None  # (4,), of MEASURES; None for what was not sampled

    def plus(self, other: BlockTraces) -> BlockTraces:
        """Return the sum with independent block traces of the same layer."""
        variances = [one for one in (self.variances, other.variances) if one is not None]
        return BlockTraces(self.total + other.total, torch.stack(variances).sum(0) if variances else None)


class Probes:
    """The mean of independent estimates of one layer's block traces, with variances; ``gram`` is ``(G, S/G, S/G)``."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        self._sum = torch.zeros_like(gram)
        self._measures: list[Tensor] = []

    def add(self, block_traces: Tensor) -> None:
        """Add one estimate."""
        self._sum = self._sum + block_traces
        self._measures.append(_measures(block_traces, self._gram))

    def estimate(self, known: Tensor | None = None) -> BlockTraces:
        """Return the mean of the estimates, plus the part ``known`` that is exact."""
        mean = self._sum / len(self._measures)
        return BlockTraces(mean if known is None else known + mean, self._variances())

    def precise(self, tolerance: float, known: Tensor | None = None) -> bool:
        """Return whether the relative standard errors of trace and relative flatness are at most ``tolerance``."""
        sizes = _measures(self.estimate(known).total, self._gram).abs()
        errors = self._variances().sqrt()
        return bool((errors[:2] <= tolerance * sizes[:2]).all())

    def _variances(self) -> Tensor:
        return torch.stack(self._measures).var(0) / len(self._measures)


def random_signs(like: Tensor, generator: Generator) -> Tensor:
    """Return random signs of the shape, type and device of ``like``, from a generator on the CPU."""
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def _measures(block_traces: Tensor, gram: Tensor) -> Tensor:
    measures = measures_of(block_traces, gram)
    return torch.stack([measures.get(name, block_traces.new_zeros(())) for name in MEASURES])


def hutchinson_residual(
    scalar: Tensor, kernels: Mapping[str, Tensor], grams: Mapping[str, Tensor], options: Options, generator: Generator
) -> dict[str, BlockTraces]:
    r"""Return block traces of ``\sum_n \sum_k (dloss/df_k) d²f_k / dW²`` by layer, with variances.

    For a kernel ``v`` of random signs, the mean of ``<v_s, (Hv)_s'>`` is ``T[s, s']``. Source: Hutchinson 1989, "A
    stochastic estimator of the trace of the influence matrix". ``scalar`` is the sum of the logits times fixed
    ``dloss/df``, in the graph of the kernels ``(S, ...)``. The groups follow from the shapes of the Gram matrices.
    """
    gradients = pull_back(scalar, list(kernels.values()), torch.ones_like(scalar), create_graph=True)
    estimates = {}
    for (name, kernel), gradient in zip(kernels.items(), gradients, strict=True):
        inner, probes = grams[name], Probes(grams[name])
        for _ in range(options.num_probes):
            v = random_signs(kernel, generator)
            (product,) = pull_back(gradient, [kernel], v)  # of the Hessian
            rows, products = (tensor.double().reshape(*inner.shape[:2], -1) for tensor in (v, product))
            traces = (rows * products).sum(2) if options.diagonal else rows @ products.mT
            probes.add(traces if options.diagonal else (traces + traces.mT) / 2)
        estimates[name] = probes.estimate()
    return estimates
