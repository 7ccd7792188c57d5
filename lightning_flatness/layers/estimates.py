"""Estimates from random probes, with their variances: of classes that are sampled, and of the Hessian's residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        self._sum = torch.zeros_like(gram)
        self._measures: list[Tensor] = []

    def add(self, block_traces: Tensor) -> None:
        """Take one estimate."""
        self.count += 1
        self._sum = self._sum + block_traces
        self._measures.append(_measures(block_traces, self._gram))

    def estimate(self, known: Tensor | None = None) -> BlockTraces:
        """The mean of the estimates, added to what is ``known`` exactly."""
        mean = self._sum / self.count
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
    measures = measures_of(block_traces, gram)
    zero = torch.zeros((), dtype=block_traces.dtype, device=block_traces.device)
    return torch.stack([measures.get(name, zero) for name in MEASURES])


def hutchinson_residual(
    scalar: Tensor,
    kernels: Mapping[str, Tensor],
    gram: Callable[[str], Tensor],
    num_probes: int,
    generator: torch.Generator,
    diagonal: bool,
) -> dict[str, BlockTraces]:
    r"""Block traces of ``\sum_n \sum_k (dloss/df_k) d²f_k / dW²`` by layer, with variances.

    For a kernel ``v`` of random signs ``<v_s, (Hv)_s'>`` has the mean ``T[s, s']``. Source: Hutchinson 1989, "A
    stochastic estimator of the trace of the influence matrix".

    Args:
        scalar: the logits times ``dloss/df``, held fixed, and summed; in the graph of the kernels.
        kernels: by layer, ``(S, ...)``; the logits have second derivatives in torch.
        gram: inner products of a layer's filters, by its name; their shape tells the groups.
        num_probes: double backward passes for every layer.
        generator: of the signs.
        diagonal: only the diagonals of the block traces.
    """
    gradients = torch.autograd.grad(scalar, list(kernels.values()), create_graph=True, allow_unused=True)
    estimates = {}
    for (name, kernel), gradient in zip(kernels.items(), gradients, strict=True):
        inner = gram(name)
        probes = Probes(inner)
        for _ in range(num_probes):
            v = random_signs(kernel, generator)
            rows, products = (t.double().reshape(*inner.shape[:2], -1) for t in (v, _product(gradient, kernel, v)))
            traces = (rows * products).sum(2) if diagonal else rows @ products.mT
            probes.add(traces if diagonal else (traces + traces.mT) / 2)
        estimates[name] = probes.estimate()
    return estimates


def _product(gradient: Tensor | None, kernel: Tensor, vector: Tensor) -> Tensor:
    """The Hessian times a vector, from the gradient in its graph."""
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(kernel)
    (product,) = torch.autograd.grad(gradient, kernel, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(kernel) if product is None else product
