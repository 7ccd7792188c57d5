"""The spectrum of a Hessian: a frozen record, its table, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.files import read, write
from lightning_flatness.results.flatness import as_text

CRITERIA = ("r_e", "k_hn", "c_t")


@dataclass(frozen=True)
class SpectrumResult:
    """Spectrum of the Hessian of the mean loss with respect to ``D`` parameters; ``print(result)`` shows a table.

    Eigenvalues and the trace are in units of loss per squared weight. The criteria are means over the probes, and
    ``spread`` holds their standard deviations. All of them depend on ``num_steps``, ``k_hn`` strongly: compare at equal
    steps only.

    Attributes:
        eigenvalues: the largest (by value, not by modulus) that were asked for, descending, float64 ``(k,)``.
        eigenvectors: orthonormal rows ``(k, D)``, in the type the products were computed in; see :meth:`eigenvector`.
        residuals: ``‖H v - λ v‖``, float64 ``(k,)``: an eigenvalue of ``H`` lies within this of the value.
        trace: estimated from the probes, with the eigenvectors' part taken exactly.
        trace_stderr: its standard error; NaN with one probe.
        ritz_values: of every probe, ascending, float64 ``(P, m)``.
        ritz_weights: float64 ``(P, m)``; of every probe they add up to one.
        r_e: ``|θ_min / θ_max|``.
        k_hn: ``Σ_{θ<0} (|θ| τ)ⁿ / Σ_{θ>0} (θ τ)ⁿ``.
        c_t: ``θ_min / θ_max``; minus infinity without a positive Ritz value.
        kind: ``"mainly positive"``, ``"mainly negative"`` or ``"quasi-singular"``; what most probes say.
        spread: standard deviation over the probes of ``r_e``, ``k_hn`` and ``c_t`` (NaN with one probe), and under
            ``"kind"`` the part of the probes that say otherwise.
        exponent: ``n`` in ``k_hn``.
        num_steps: Lanczos steps ``m`` of every probe.
        num_probes: ``P``.
        num_products: of the matrix with vectors, each a pass over all samples.
        parameters: shapes of the chosen parameters by name, in the order of the eigenvectors' entries.
        weight_norm: of these parameters together.
        num_samples: samples measured.
        loss: the mean loss.
        loss_name: which loss.
        matrix: ``"hessian"`` or ``"gauss_newton"``.
        converged: whether all residuals are within the tolerance asked for.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    trace: float
    trace_stderr: float
    ritz_values: Tensor
    ritz_weights: Tensor
    r_e: float
    k_hn: float
    c_t: float
    kind: str
    spread: Mapping[str, float]
    exponent: float
    num_steps: int
    num_probes: int
    num_products: int
    parameters: Mapping[str, tuple[int, ...]]
    weight_norm: float
    num_samples: int
    loss: float
    loss_name: str
    matrix: str
    converged: bool

    @property
    def num_parameters(self) -> int:
        """``D``."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    def eigenvector(self, index: int) -> dict[str, Tensor]:
        """One eigenvector as tensors shaped like the parameters, by name.

        Args:
            index: 0 for that of the largest eigenvalue.
        """
        sizes = [math.prod(shape) for shape in self.parameters.values()]
        pieces = self.eigenvectors[index].split(sizes)
        return {name: p.reshape(shape) for (name, shape), p in zip(self.parameters.items(), pieces, strict=True)}

    def density(self, grid: Tensor | None = None, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """The spectral density, averaged over the probes, every Ritz value broadened to a Gaussian; integral one.

        Args:
            grid: eigenvalues ``(G,)``; by default 2,000 that reach four ``sigma`` beyond the outermost Ritz values.
            sigma: in units of the eigenvalues; by default a hundredth of the range of the Ritz values.

        Returns:
            The grid and the density there, both float64 ``(G,)``.

        Raises:
            FlatnessError: ``sigma`` is not positive.

        Source:
            Ghorbani, Krishnan and Xiao 2019 (arXiv 1901.10159), section 3.
        """
        low, high = float(self.ritz_values.min()), float(self.ritz_values.max())
        if sigma is None:
            sigma = (high - low or abs(high) or 1.0) / 100
        if not sigma > 0:
            raise FlatnessError(f"sigma={sigma!r} must be positive.")
        if grid is None:
            grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, 2000, dtype=torch.float64)
        grid = grid.double()
        # For every probe, so that memory stays that of one.
        parts = [broadened(v, w, grid, sigma) for v, w in zip(self.ritz_values, self.ritz_weights, strict=True)]
        return grid, torch.stack(parts).mean(0)

    def table(self) -> Table:
        """The result as a rich table."""
        matrix = "Hessian" if self.matrix == "hessian" else "Gauss-Newton matrix"
        table = Table(
            title=f"Spectrum of the {matrix}, {number_of(self.num_parameters, 'parameter')}, "
            f"{number_of(self.num_samples, 'sample')}",
            caption=f"Mean {self.loss_name} {self.loss:.4g}. {number_of(self.num_probes, 'probe')} of "
            f"{number_of(self.num_steps, 'Lanczos step')}, {number_of(self.num_products, 'product')}; compare "
            "criteria at equal steps only. ±: standard error of the trace, standard deviation of the criteria over "
            "probes, residual of eigenvalues."
            + ("" if self.converged else " Eigenvalues have not converged: allow more products (max_products=)."),
            caption_justify="left",
        )
        table.add_column("number")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("±", justify="right", no_wrap=True)
        for index, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1):
            table.add_row(f"λ{index}", f"{float(value):.6g}", f"{float(residual):.1g}")
        table.add_row("trace", f"{self.trace:.5g}", _error(self.trace_stderr))
        for label, name in (("r_e", "r_e"), (f"K_Hn, n = {self.exponent:g}", "k_hn"), ("C_t", "c_t")):
            table.add_row(label, f"{getattr(self, name):.4g}", _error(self.spread[name]))
        others = self.spread["kind"]
        table.add_row("kind", self.kind, f"{others:.0%} of probes differ" if others else "all probes")
        return table

    def __str__(self) -> str:
        return as_text(self.table())

    def save(self, path: str | PathLike[str]) -> None:
        """Write a compressed file of plain arrays and text, without pickle, to be read with :meth:`load`.

        Args:
            path: of the file, ``.npz``.

        Raises:
            FlatnessError: the name ends with something else.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        record = {name: value for name, value in vars(self).items() if name not in tensors}
        record |= {name: dict(record[name]) for name in ("parameters", "spread")}
        write(path, SpectrumResult, record, tensors)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SpectrumResult:
        """Read what :meth:`save` has written.

        Args:
            path: of the file.

        Raises:
            FlatnessError: something else is in the file, or it is broken.
        """
        return read(path, cls, _fields)


def _fields(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    record["parameters"] = {name: tuple(shape) for name, shape in record["parameters"].items()}
    return {**record, **tensors}


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def number_of(number: int, thing: str) -> str:
    """Both, in the singular or plural.

    Example:
        >>> number_of(1, "probe"), number_of(2, "probe")
        ('1 probe', '2 probes')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def broadened(values: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """A sum of Gaussians on a grid.

    Args:
        values: where, ``(m,)``.
        weights: integrals, ``(m,)``.
        grid: ``(G,)``.
        sigma: the standard deviation of all.

    Example:
        >>> grid = torch.linspace(-1, 3, 401)
        >>> found = broadened(torch.tensor([1.0]), torch.tensor([1.0]), grid, 0.1)
        >>> float(grid[found.argmax()]), round(float(found.sum() * 0.01), 6)
        (1.0, 1.0)
    """
    distances = (grid[:, None] - values) / sigma
    return torch.exp(-distances.square() / 2) @ weights / (sigma * math.sqrt(2 * math.pi))
