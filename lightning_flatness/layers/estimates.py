"""Estimate block traces by random probes, with variances.

A probe is a vector or kernel of random signs. Probes estimate the sum over classes that add little to the loss's second
derivative at the logits. They also estimate the part of the Hessian that the Gauss-Newton method leaves out.
"""

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
    """Block traces of one layer, summed over samples, and the measures that cannot be computed from them."""

    total: Tensor  # (G, S/G, S/G), or (G, S/G) for the diagonals, float64
    extra: Tensor  # (2,): normalised relative and channel-wise flatness, summed over samples; NaN if not measured
    samples: Tensor | None  # (N, 4), the SAMPLE_MEASURES of every sample; None if they are unknown
    variances: Tensor | None = None  # (6,), of ALL_MEASURES, summed over samples; None without probes

    @classmethod
    def of(cls, contraction: Contraction) -> BlockTraces:
        """Convert a :class:`Contraction`. The result has no variances, because nothing was estimated by probes."""
        return cls(contraction.total, contraction.samples[:, NORMALIZED:].sum(0), contraction.samples)

    def plus(self, other: BlockTraces) -> BlockTraces:
        """Add other block traces of the same layer. Estimates must be independent, because variances are added."""
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
        """Compute ``ALL_MEASURES`` from the summed block traces, ``(6,)``. A measure that is not wanted is zero or NaN.

        ``gram`` is the Gram matrix of the filters, or its diagonal.
        """
        measures = measures_of(self.total, gram) | {
            "normalized_relative_flatness": self.extra[0],
            "channelwise_flatness": self.extra[1],
        }
        return torch.stack([measures.get(name, self.total.new_zeros(())) for name in ALL_MEASURES])


class Probes:
    """Collects independent estimates of one layer's block traces, and returns their mean with variances.

    ``gram`` is the Gram matrix of the layer's filters, ``(G, S/G, S/G)``, or its diagonal, ``(G, S/G)``.
    """

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        self._sum: BlockTraces | None = None
        self._measures: list[Tensor] = []

    def add(self, estimate: BlockTraces) -> None:
        """Add one independent estimate of the block traces."""
        self._sum = estimate if self._sum is None else self._sum.plus(estimate)
        self._measures.append(estimate.measures(self._gram))

    def estimate(self, known: BlockTraces | None = None) -> BlockTraces:
        """Return the mean of the estimates plus ``known``, the part of the block traces that was computed exactly."""
        assert self._sum is not None
        number = len(self._measures)
        samples = None if self._sum.samples is None else self._sum.samples / number
        mean = BlockTraces(self._sum.total / number, self._sum.extra / number, samples, self._variances())
        return mean if known is None else known.plus(mean)

    def precise(self, tolerance: float, known: BlockTraces | None = None) -> bool:
        """Return whether the relative standard errors of :meth:`estimate` are at most ``tolerance``.

        This tests the errors of the trace, of relative flatness and, if measured, of normalised relative flatness.
        """
        sizes = self.estimate(known).measures(self._gram).abs()
        errors = self._variances().sqrt()
        wanted = [ALL_MEASURES.index(name) for name in SAMPLE_MEASURES[: NORMALIZED + 1]]
        return not bool((errors[wanted] > tolerance * sizes[wanted]).any())

    def _variances(self) -> Tensor:
        """Return the variances of the measures of the mean estimate, ``(6,)``."""
        return torch.stack(self._measures).var(0) / len(self._measures)


def random_signs(like: Tensor, generator: Generator) -> Tensor:
    """Return random signs with the shape, dtype and device of ``like``, drawn from a generator on the CPU."""
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def hutchinson_residual(
    scalar: Tensor,
    kernels: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    weightings: Mapping[str, Weighting],
    options: Options,
    generator: Generator,
) -> dict[str, BlockTraces]:
    """Estimate the block traces of each layer's Hessian minus its Gauss-Newton matrix, with variances.

    This difference is ``H = Σ_n Σ_k (dloss/df_k) d²f_k / dW²`` for logits ``f``. For a kernel ``v`` of random
    signs, the mean of ``<v_s, (Hv)_s'>`` is the block trace of filters ``s`` and ``s'``. Source: Hutchinson 1989, "A
    stochastic estimator of the trace of the influence matrix".

    Args:
        scalar: the sum of the logits times ``dloss/df``, with its autograd graph. In this graph, ``dloss/df`` is a
            constant.
        kernels: the kernels ``(S, ...)`` in this graph, keyed by layer name.
        grams: Gram matrices ``(G, S/G, S/G)`` of the filters, or their diagonals, keyed by layer name.
        weightings: the matrices for normalised relative and channel-wise flatness, keyed by layer name.
        options: the number of probes, and whether diagonals suffice.
        generator: draws the random signs.
    """
    gradients = pull_back(scalar, list(kernels.values()), torch.ones_like(scalar), create_graph=True)
    estimates = {}
    for (name, kernel), gradient in zip(kernels.items(), gradients, strict=True):
        inner, probes = grams[name], Probes(grams[name])
        for _ in range(options.num_probes):
            v = random_signs(kernel, generator)
            (product,) = pull_back(gradient, [kernel], v)  # Hv
            rows, products = (tensor.double().reshape(*inner.shape[:2], -1) for tensor in (v, product))
            traces = (rows * products).sum(2) if options.diagonal else rows @ products.mT
            traces = traces if options.diagonal else (traces + traces.mT) / 2
            extra = _extra(weightings[name], rows[None], products[None], options.diagonal)
            probes.add(BlockTraces(traces, extra, None))
        estimates[name] = probes.estimate()
    return estimates


def _extra(weighting: Weighting, rows: Tensor, products: Tensor, diagonal: bool) -> Tensor:
    """Return one probe's estimate of normalised relative and channel-wise flatness, ``(2,)``; NaN if not measured.

    ``rows`` is the probe ``v`` and ``products`` is ``Hv``, both ``(1, G, S/G, D)``.
    """
    extra = rows.new_full((2,), torch.nan)
    if weighting.normalized is not None and not diagonal:
        scaled = [weighting.scaled_patches(one)[0] for one in (rows, products)]
        extra[0] = (weighting.normalized.to(rows) * (scaled[0] @ scaled[1].mT)).sum()
    if weighting.kernel is not None:
        extra[1] = channelwise_values(weighting.kernel, rows, products)[0]
    return extra
