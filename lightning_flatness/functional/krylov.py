"""Steps that Krylov methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A vector minus its part in the span of orthonormal rows, and its coefficients there.

    Twice, which is enough (Parlett 1998, section 6.9).

    Args:
        vector: ``(D,)``.
        basis: ``(m, D)``, orthonormal rows.

    Returns:
        ``(D,)`` and float64 ``(m,)`` on the CPU.

    Example:
        >>> orthogonalised(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]))
        (tensor([0., 4.]), tensor([3.], dtype=torch.float64))
    """
    total = torch.zeros(len(basis)).double()
    for _ in range(2):
        coefficients = basis @ vector
        vector = torch.addmv(vector, basis.T, coefficients, alpha=-1)
        total += coefficients.double().cpu()
    return vector, total


def random_orthogonal(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector ``(D,)`` orthogonal to fewer than ``D`` orthonormal rows ``(m, D)``.

    Example:
        >>> random_orthogonal(torch.tensor([[1.0, 0.0]]), torch.Generator())[0].item()
        0.0
    """
    vector: Tensor = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(basis)
    for _ in range(2):  # again, for what is left may be short
        vector, _ = orthogonalised(vector / vector.norm(), basis)
    unit: Tensor = vector / vector.norm()
    return unit


def breaks_down(norm: float, scale: float, vector: Tensor) -> bool:
    """Whether a remainder of this norm is rounding error beside products of norm ``scale``: the space is invariant.

    Example:
        >>> breaks_down(1e-15, 1.0, torch.zeros(3).double())
        True
    """
    return norm <= 100 * torch.finfo(vector.dtype).eps * scale
