"""Estimates from random probes, with variances: for sampled classes, and for the residual of the Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightning_flatness.functional import measures_of
from lightning_flatness.functional.weighting import (
    NORMALIZED,
    SAMPLE_MEASURES,
    Contraction,
    Weighting,
    channelwise_values,
)
from lightning_flatness.layers.cotangents import pull_back
from lightning_flatness.layers.options import ALL_MEASURES, Options


class BlockTraces(NamedTuple):
    """Block traces of one layer, summed over samples, and what its measures need besides."""

    total: Tensor  # (G, S/G, S/G), or (G, S/G) for the diagonals, float64
    extra: Tensor  # (2,): normalised relative flatness and channel-wise flatness of the sum; NaN if not measured
    samples: Tensor | None  # (N, 4), values of every sample, of SAMPLE_MEASURES; None if they are not known
    variances: Tensor | None = None  # (6,), of ALL_MEASURES, if probes estimated them

    @classmethod
    def of(cls, contraction: Contraction) -> BlockTraces:
        """Return the block traces of a contraction."""
        return cls(contraction.total, contraction.samples[:, NORMALIZED:].sum(0), contraction.samples)

    def plus(self, other: BlockTraces) -> BlockTraces:
        """Return the sum with independent block traces of the same layer."""
        samples = None
        if self.samples is not None and other.samples is not None:
            samples = self.samples + other.samples
        variances = [one for one in (self.variances, other.variances) if one is not None]
        return BlockTraces(
            self.total + other.total,
            self.extra + other.extra,
            samples,
            torch.stack(variances).sum(0) if variances else None,
        )

    def measures(self, gram: Tensor) -> Tensor:
        """Return the measures of the sum, ``(6,)``, of ``ALL_MEASURES``; zero or NaN if not measured."""
        measures = measures_of(self.total, gram) | {
            "normalized_relative_flatness": self.extra[0],
            "channelwise_flatness": self.extra[1],
        }
        return torch.stack([measures.get(name, self.total.new_zeros(())) for name in ALL_MEASURES])


class Probes:
    """The mean of independent estimates of one layer's block traces, with variances; ``gram`` is ``(G, S/G, S/G)``."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        self._sum: BlockTraces | None = None
        self._measures: list[Tensor] = []

    def add(self, estimate: BlockTraces) -> None:
        """Add one estimate."""
        self._sum = estimate if self._sum is None else self._sum.plus(estimate)
        self._measures.append(estimate.measures(self._gram))

    def estimate(self, known: BlockTraces | None = None) -> BlockTraces:
        """Return the mean of the estimates, plus the part ``known`` that is exact."""
        assert self._sum is not None
        number = len(self._measures)
        samples = None if self._sum.samples is None else self._sum.samples / number
        mean = BlockTraces(self._sum.total / number, self._sum.extra / number, samples, self._variances())
        return mean if known is None else known.plus(mean)

    def precise(self, tolerance: float, known: BlockTraces | None = None) -> bool:
        """Return whether relative standard errors are at most ``tolerance``, of trace and relative flatness.

        The same holds of normalised relative flatness, if it is measured.
        """
        sizes = self.estimate(known).measures(self._gram).abs()
        errors = self._variances().sqrt()
        wanted = [ALL_MEASURES.index(name) for name in SAMPLE_MEASURES[: NORMALIZED + 1]]
        return not bool((errors[wanted] > tolerance * sizes[wanted]).any())

    def _variances(self) -> Tensor:
        return torch.stack(self._measures).var(0) / len(self._measures)


def random_signs(like: Tensor, generator: Generator) -> Tensor:
    """Return random signs of the shape, type and device of ``like``, from a generator on the CPU."""
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def hutchinson_residual(
    scalar: Tensor,
    kernels: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    weightings: Mapping[str, Weighting],
    options: Options,
    generator: Generator,
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
            traces = traces if options.diagonal else (traces + traces.mT) / 2
            extra = _extra(weightings[name], rows[None], products[None], options.diagonal)
            probes.add(BlockTraces(traces, extra, None))
        estimates[name] = probes.estimate()
    return estimates


def _extra(weighting: Weighting, rows: Tensor, products: Tensor, diagonal: bool) -> Tensor:
    """Return one probe's estimate of the normalised and the channel-wise measure, ``(2,)``; NaN if not measured.

    ``rows`` are the probe and ``products`` its products with the Hessian, ``(1, G, S/G, D)``.
    """
    extra = rows.new_full((2,), torch.nan)
    if weighting.normalized is not None and not diagonal:
        scaled = [weighting.scaled_patches(one)[0] for one in (rows, products)]
        extra[0] = (weighting.normalized.to(rows) * (scaled[0] @ scaled[1].mT)).sum()
    if weighting.kernel is not None:
        extra[1] = channelwise_values(weighting.kernel, rows, products)[0]
    return extra
