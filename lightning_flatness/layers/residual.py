"""The part of the Hessian that Gauss-Newton leaves out, estimated by random probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_flatness.layers.probes import BlockTraces, Probes, random_signs


def hutchinson_residual(
    scalar: Tensor,
    kernels: Mapping[str, Tensor],
    gram: Callable[[str], Tensor],
    num_probes: int,
    generator: torch.Generator,
    diagonal: bool,
) -> dict[str, BlockTraces | None]:
    r"""Block traces of ``\sum_n \sum_k (dloss/df_k) d²f_k / dW²`` by layer, with variances.

    For a kernel ``v`` of random signs ``<v_s, (Hv)_s'>`` has the mean ``T[s, s']``. Source: Hutchinson 1989, "A
    stochastic estimator of the trace of the influence matrix".

    Args:
        scalar: the logits times ``dloss/df``, held fixed, and summed; in the graph of the kernels.
        kernels: by layer, ``(S, ...)``.
        gram: inner products of a layer's filters, by its name; their shape tells the groups.
        num_probes: double backward passes for every layer.
        generator: of the signs.
        diagonal: only the diagonals of the block traces.

    Returns:
        By layer; None where an operation has no second derivative in torch.
    """
    gradients = torch.autograd.grad(scalar, list(kernels.values()), create_graph=True, allow_unused=True)
    estimates: dict[str, BlockTraces | None] = {}
    for (name, kernel), gradient in zip(kernels.items(), gradients, strict=True):
        inner = gram(name)
        probes = Probes(inner)
        for _ in range(num_probes):
            v = random_signs(kernel, generator)
            product = _hessian_product(gradient, kernel, v)
            if product is None:
                break
            rows, products = (t.double().reshape(*inner.shape[:2], -1) for t in (v, product))
            found = (rows * products).sum(2) if diagonal else rows @ products.mT
            probes.add(found if diagonal else (found + found.mT) / 2)
        estimates[name] = probes.estimate() if probes.count == num_probes else None
    return estimates


def _hessian_product(gradient: Tensor | None, kernel: Tensor, vector: Tensor) -> Tensor | None:
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(kernel)
    try:
        (product,) = torch.autograd.grad(gradient, kernel, vector, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return None
    return torch.zeros_like(kernel) if product is None else product
