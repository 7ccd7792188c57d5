"""Steps that all Krylov methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Split a vector into the part orthogonal to a basis, and coefficients in the basis.

    The projection is subtracted twice, which makes the result orthogonal to working precision.

    Args:
        vector: ``(D,)``.
        basis: ``(m, D)``, orthonormal rows.

    Returns:
        The orthogonal part ``(D,)``, and the coefficients, float64 ``(m,)`` on the CPU.

    Source:
        Parlett 1998, "The Symmetric Eigenvalue Problem", Section 6.9.

    Example:
        >>> orthogonalised(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]))
        (tensor([0., 4.]), tensor([3.], dtype=torch.float64))
    """
    total = torch.zeros(len(basis), device="cpu").double()
    for _ in range(2):
        coefficients = basis @ vector
        vector = torch.addmv(vector, basis.T, coefficients, alpha=-1)
        total += coefficients.double().cpu()
    return vector, total


def random_orthogonal(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random unit vector ``(D,)`` orthogonal to a basis.

    Args:
        basis: ``(m, D)``, orthonormal rows, ``m < D``.
        generator: of the CPU.

    Example:
        >>> random_orthogonal(torch.tensor([[1.0, 0.0]]), torch.Generator())[0].item()
        0.0
    """
    vector: Tensor = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(basis)
    for _ in range(2):  # twice, since the first result may be short, so that its rounding errors count
        vector, _ = orthogonalised(vector / vector.norm(), basis)
    unit: Tensor = vector / vector.norm()
    return unit


def rounding_error(dtype: torch.dtype) -> float:
    """Return the size, relative to a product, below which a remainder is taken for rounding error.

    A Krylov space whose next vector is that small is invariant under the operator.

    Example:
        >>> rounding_error(torch.float64) < 1e-13
        True
    """
    return 100 * torch.finfo(dtype).eps
