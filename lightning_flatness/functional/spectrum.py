"""Spectra of symmetric operators, estimated from random vectors by Lanczos quadrature, and Gabdullin's criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.lanczos import orthogonalised, random_orthogonal, rounding_error

Product = Callable[[Tensor], Tensor]

# A spectrum is mainly positive if C_t (see spectrum_criteria) is above this (Gabdullin 2025).
MAINLY_POSITIVE = -0.6
# A spectrum is quasi-singular if max |θ| ‖w‖² is at most this, in units of the loss.
QUASI_SINGULAR = 1e-3


class Quadrature(NamedTuple):
    """Quadrature of the spectrum of a symmetric operator ``A`` on vectors ``(D,)``, from one random vector (the probe).

    For a function ``f``, ``Σ_i weights[i] f(values[i])`` estimates ``Tr f(A) / D``.

    Attributes:
        values: Ritz values, ascending, float64 ``(m,)``.
        weights: their weights, float64 ``(m,)``, whose sum is one.
        rayleigh: ``qᵀAq``, where ``q`` is the probe divided by its norm.
        asymmetry: largest ``|q_iᵀA q_j - q_jᵀA q_i|`` for Lanczos vectors ``q``, divided by the largest ``‖A q_i‖``.

    Example:
        >>> matrix, probe = torch.diag(torch.tensor([1.0, 4.0]).double()), torch.ones(2).double()
        >>> found = lanczos_quadrature(lambda v: matrix @ v, probe, torch.empty(2, 2).double(), torch.Generator())
        >>> found.values.round(decimals=6), found.weights.round(decimals=6), round(found.rayleigh, 6)
        (tensor([1., 4.], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64), 2.5)
    """

    values: Tensor
    weights: Tensor
    rayleigh: float
    asymmetry: float


def lanczos_quadrature(product: Product, probe: Tensor, basis: Tensor, generator: torch.Generator) -> Quadrature:
    """Compute Ritz values and weights by ``min(m, D)`` Lanczos steps, each re-orthogonalised twice.

    If the Krylov space of the probe becomes invariant, the steps continue with a random vector orthogonal to this
    space. That adds other eigenvalues with weight zero, so the quadrature stays exact for the probe.

    Args:
        product: function that multiplies the operator with a vector, ``(D,) -> (D,)``.
        probe: vector ``(D,)``, not zero; its norm does not matter.
        basis: memory ``(m, D)``, which is overwritten by the orthonormal Lanczos vectors.
        generator: CPU generator for the random vectors, needed only if the Krylov space becomes invariant.

    Source:
        Golub and Meurant 1994, and Ubaru, Chen and Saad 2017, for the quadrature; Parlett 1998, "The Symmetric
        Eigenvalue Problem", Chapter 13, for the steps.

    Example:
        >>> matrix, probe = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), torch.ones(3).double()
        >>> quadrature = lanczos_quadrature(lambda v: matrix @ v, probe, torch.empty(3, 3).double(), torch.Generator())
        >>> quadrature.values.round(decimals=6), quadrature.weights.round(decimals=6)
        (tensor([1., 2., 4.], dtype=torch.float64), tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64))
    """
    num_steps = min(basis.shape)
    diagonal, beyond = (torch.zeros(n, device="cpu").double() for n in (num_steps, max(num_steps - 1, 0)))
    basis[0] = probe / probe.norm()
    scale = asymmetry = 0.0
    for step in range(num_steps):
        image = product(basis[step])
        scale = max(scale, float(image.norm()))
        image, coefficients = orthogonalised(image, basis[: step + 1])
        diagonal[step] = coefficients[step]
        expected = torch.zeros(step, device="cpu").double()  # if the operator is symmetric
        expected[-1:] = beyond[step - 1] if step else 0.0
        asymmetry = max([asymmetry, *(coefficients[:step] - expected).abs().tolist()])
        if step + 1 == num_steps:
            break
        norm = float(image.norm())
        if norm <= rounding_error(image.dtype) * scale:
            basis[step + 1] = random_orthogonal(basis[: step + 1], generator)
        else:
            beyond[step] = norm
            basis[step + 1] = image / norm
    return Quadrature(*_nodes(diagonal, beyond), float(diagonal[0]), asymmetry / scale if scale else 0.0)


def _nodes(diagonal: Tensor, beyond: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a tridiagonal matrix's eigenvalues, and the squared first components of its eigenvectors."""
    matrix = torch.diag(diagonal) + torch.diag(beyond, 1) + torch.diag(beyond, -1)
    values, vectors = torch.linalg.eigh(matrix)  # blocks separated by a zero in beyond are not mixed
    return values, vectors[0].square()


class Criteria(NamedTuple):
    """Gabdullin's criteria of a spectrum for each of ``P`` probes; :func:`spectrum_criteria` defines them.

    Attributes:
        r_e: ``|C_t|``, ``(P,)``.
        k_hn: ``K_Hn``, ``(P,)``.
        c_t: ``C_t``, ``(P,)``.
        kinds: ``"mainly positive"``, ``"mainly negative"`` or ``"quasi-singular"``, one for every probe.

    Example:
        >>> criteria = spectrum_criteria(torch.tensor([[-1.0, 4.0], [-3.0, 4.0]]), torch.full((2, 2), 0.5))
        >>> criteria.c_t, criteria.kinds
        (tensor([-0.2500, -0.7500]), ['mainly positive', 'mainly negative'])
    """

    r_e: Tensor
    k_hn: Tensor
    c_t: Tensor
    kinds: list[str]


def spectrum_criteria(
    values: Tensor, weights: Tensor, exponent: float = 0.5, scale: float = 1.0, zero: float = 0.0
) -> Criteria:
    """Compute Gabdullin's criteria of a spectrum for each of ``P`` probes (random vectors).

    The criteria are ``C_t = min θ / max θ``, ``r_e = |C_t|`` and ``K_Hn = Σ_{θ<0} (|θ| τ)ⁿ / Σ_{θ>0} (θ τ)ⁿ``. Here
    ``θ`` are the Ritz values of one probe, and ``τ`` their quadrature weights. If no ``θ`` is positive, ``C_t`` is
    minus infinity, and ``r_e`` and ``K_Hn`` are infinite. If all ``θ`` are zero, all three are NaN.

    A spectrum is *quasi-singular* if every ``|θ|`` times ``scale`` is at most ``1e-3`` (a threshold of this package).
    For a Hessian with respect to ``w``, ``scale`` is ``‖w‖²``. A spectrum that is not quasi-singular is *mainly
    positive* if ``C_t > -0.6``, and *mainly negative* otherwise.

    Args:
        values: Ritz values ``θ``, ``(P, m)``.
        weights: their weights ``τ``, ``(P, m)``; see :class:`Quadrature`.
        exponent: ``n``.
        scale: factor of ``|θ|`` as above.
        zero: a ``θ`` counts as zero if ``|θ|`` is at most ``zero`` times the largest ``|θ|`` of its probe.

    Source:
        Gabdullin 2024 (arXiv 2412.10146), and 2025 (arXiv 2504.17618) for ``C_t`` and the kinds.

    Example:
        >>> criteria = spectrum_criteria(torch.tensor([[-1.0, 4.0]]), torch.tensor([[0.5, 0.5]]))
        >>> criteria.r_e, criteria.k_hn, criteria.c_t, criteria.kinds
        (tensor([0.2500]), tensor([0.5000]), tensor([-0.2500]), ['mainly positive'])
    """
    largest = values.abs().amax(1)
    values = torch.where(values.abs() <= zero * largest[:, None], 0.0, values)
    negative, positive = ((part.clamp(min=0) * weights).pow(exponent).sum(1) for part in (-values, values))
    low, high = values.amin(1), values.amax(1)
    without_positive = torch.where(low < 0, -math.inf, math.nan).to(values)
    c_t = torch.where(high > 0, low / high, without_positive)
    kinds = [
        "quasi-singular"
        if float(size) * scale <= QUASI_SINGULAR
        else "mainly positive"
        if float(ratio) > MAINLY_POSITIVE
        else "mainly negative"
        for size, ratio in zip(largest, c_t, strict=True)
    ]
    return Criteria(c_t.abs(), negative / positive, c_t, kinds)
