"""Spectra of symmetric operators from random probes: Lanczos quadrature and criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.krylov import breaks_down, orthogonalised, random_orthogonal

Product = Callable[[Tensor], Tensor]

# A spectrum is mainly positive above this C_t (Gabdullin 2025).
MAINLY_POSITIVE = -0.6
# max |θ| ‖w‖², in units of the loss, up to which a spectrum counts as zero.
QUASI_SINGULAR = 1e-3


class Quadrature(NamedTuple):
    """What one probe tells of a spectrum: ``Σ_i weights[i] f(values[i])`` estimates ``Tr f(A) / D``."""

    values: Tensor  # (m,) Ritz values, ascending, float64
    weights: Tensor  # (m,), they add up to one
    rayleigh: float  # q'Aq of the unit probe
    asymmetry: float  # largest |q_i'A q_j - q_j'A q_i| seen, relative to the largest ‖A q‖


def lanczos_quadrature(product: Product, probe: Tensor, basis: Tensor, generator: torch.Generator) -> Quadrature:
    """Ritz values and weights from ``min(m, D)`` Lanczos steps with full re-orthogonalisation, done twice.

    Where the Krylov space of the probe ends before, the recurrence goes on with a random vector orthogonal to it: other
    eigenvalues appear, with weight zero, and the quadrature is exact for the probe.

    Args:
        product: of a symmetric operator with a vector, ``(D,) -> (D,)``.
        probe: ``(D,)``; unit length is not needed.
        basis: ``(m, D)``, is overwritten with the orthonormal Lanczos vectors.
        generator: of vectors to go on with.

    Source:
        Golub and Meurant 1994; Ubaru, Chen and Saad 2017 for the quadrature; Parlett 1998, chapter 13.

    Example:
        >>> matrix, probe = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), torch.ones(3).double()
        >>> found = lanczos_quadrature(lambda v: matrix @ v, probe, torch.empty(3, 3).double(), torch.Generator())
        >>> found.values.round(decimals=6), found.weights.round(decimals=6)
        (tensor([1., 2., 4.], dtype=torch.float64), tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64))
    """
    num_steps = min(basis.shape)
    diagonal, beyond = torch.zeros(num_steps).double(), torch.zeros(max(num_steps - 1, 0)).double()
    basis[0] = probe / probe.norm()
    scale = asymmetry = 0.0
    for step in range(num_steps):
        image = product(basis[step])
        scale = max(scale, float(image.norm()))
        image, coefficients = orthogonalised(image, basis[: step + 1])
        diagonal[step] = coefficients[step]
        known = torch.zeros(step).double()  # what these are by symmetry, from the products before
        known[-1:] = beyond[step - 1] if step else 0.0
        asymmetry = max([asymmetry, *(coefficients[:step] - known).abs().tolist()])
        if step + 1 == num_steps:
            break
        norm = float(image.norm())
        if breaks_down(norm, scale, image):
            basis[step + 1] = random_orthogonal(basis[: step + 1], generator)
        else:
            beyond[step] = norm
            basis[step + 1] = image / norm
    return Quadrature(*_nodes(diagonal, beyond), float(diagonal[0]), asymmetry / scale if scale else 0.0)


def _nodes(diagonal: Tensor, beyond: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, and squares of the first components of its eigenvectors."""
    matrix = torch.diag(diagonal) + torch.diag(beyond, 1) + torch.diag(beyond, -1)
    values, vectors = torch.linalg.eigh(matrix)  # blocks between which beyond is zero are not mixed
    return values, vectors[0].square()


class Criteria(NamedTuple):
    """The criteria of every probe, ``(P,)``, and the kind of spectrum that most of them see."""

    r_e: Tensor
    k_hn: Tensor
    c_t: Tensor
    kinds: list[str]


def spectrum_criteria(
    values: Tensor, weights: Tensor, exponent: float = 0.5, scale: float = 1.0, zero: float = 0.0
) -> Criteria:
    """Gabdullin's criteria of a spectrum, for every probe.

    With ``θ`` the Ritz values and ``τ`` their weights: ``C_t = min θ / max θ``, ``r_e = |C_t|`` and ``K_Hn = Σ_{θ<0}
    (|θ| τ)ⁿ / Σ_{θ>0} (θ τ)ⁿ``. Without a positive ``θ`` the ratios are minus infinity and infinity; they are NaN for a
    zero operator. A spectrum is *mainly positive* where ``C_t > -0.6``, else *mainly negative*; it is *quasi-singular*
    where all ``|θ| scale`` are at most ``1e-3`` (our number: the source has none that we know of).

    Args:
        values: ``(P, m)``.
        weights: ``(P, m)``.
        exponent: ``n``.
        scale: that makes eigenvalues comparable, ``‖w‖²`` for a Hessian with respect to ``w``.
        zero: Ritz values of at most this modulus, relative to the largest, count as zero.

    Source:
        Gabdullin 2024 (arXiv 2412.10146) for ``r_e`` and ``K_Hn``; 2025 (arXiv 2504.17618) for ``C_t`` and the kinds.

    Example:
        >>> found = spectrum_criteria(torch.tensor([[-1.0, 4.0]]), torch.tensor([[0.5, 0.5]]))
        >>> found.r_e, found.k_hn, found.c_t, found.kinds
        (tensor([0.2500]), tensor([0.5000]), tensor([-0.2500]), ['mainly positive'])
    """
    largest = values.abs().amax(1)
    values = torch.where(values.abs() <= zero * largest[:, None], 0.0, values)
    negative, positive = ((part.clamp(min=0) * weights).pow(exponent).sum(1) for part in (-values, values))
    low, high = values.amin(1), values.amax(1)
    without = torch.where(low < 0, -math.inf, math.nan).to(values)
    c_t = torch.where(high > 0, low / high, without)
    kinds = [
        "quasi-singular"
        if float(size) * scale <= QUASI_SINGULAR
        else "mainly positive"
        if float(ratio) > MAINLY_POSITIVE
        else "mainly negative"
        for size, ratio in zip(largest, c_t, strict=True)
    ]
    return Criteria(c_t.abs(), negative / positive, c_t, kinds)
