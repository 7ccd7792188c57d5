"""The spectrum of a Hessian, as a frozen dataclass that can be printed and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import as_text, number_of

CRITERIA = ("r_e", "k_hn", "c_t")
NO_DENSITY = "The spectrum has no density, as it was computed with num_probes=0. To get one, use num_probes=4 or more."
# Names of the values of ``SpectrumResult.matrix`` in tables and figures.
MATRICES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}


@dataclass(frozen=True, repr=False, eq=False)
class SpectrumResult(Record):
    """Spectrum of the Hessian ``H`` of the mean loss with respect to ``D`` parameters; ``print`` shows a table.

    The largest eigenvalues are computed one by one. The density, the trace and three criteria are estimated from ``P``
    random vectors, called probes. ``m`` Lanczos steps from a probe give ``m`` Ritz values ``θ``, which approximate
    eigenvalues, and their weights ``τ``. Eigenvalues, Ritz values and the trace are in loss per squared weight. The
    criteria ``r_e``, ``k_hn`` and ``c_t`` (Gabdullin 2024, 2025) compare the negative part of the spectrum with the
    positive part. Each is a mean over the probes. Criteria depend on ``num_steps`` (``k_hn`` strongly), so compare only
    results with equal ``num_steps``.

    Attributes:
        eigenvalues: ``λ``, the ``k`` largest eigenvalues (by value, not by modulus), descending, float64 ``(k,)``.
        eigenvectors: orthonormal rows ``v``, float32 or float64 ``(k, D)``; see :meth:`eigenvector`.
        residuals: ``‖H v - λ v‖``, float64 ``(k,)``; at least one eigenvalue of ``H`` is at most this far from ``λ``.
        trace: trace of ``H``, estimated from the probes; the part along the computed eigenvectors is exact.
        trace_stderr: standard error of the trace; NaN with one probe.
        ritz_values: ``θ``, float64 ``(P, m)``, ascending for every probe.
        ritz_weights: ``τ``, float64 ``(P, m)``; the weights of each probe sum to one.
        r_e: ``|θ_min / θ_max|``.
        k_hn: ``Σ_{θ<0} (|θ| τ)ⁿ / Σ_{θ>0} (θ τ)ⁿ``.
        c_t: ``θ_min / θ_max``; minus infinity if no Ritz value is positive, and NaN if all are zero.
        kind: ``"mainly positive"``, ``"mainly negative"`` or ``"quasi-singular"``, the kind of spectrum that most
            probes show. ``functional.spectrum_criteria`` defines the kinds.
        spread: mapping from ``"r_e"``, ``"k_hn"`` and ``"c_t"`` to their standard deviations over the probes (NaN with
            one probe). The key ``"kind"`` maps to the share of the probes that have another kind.
        exponent: ``n`` in ``k_hn``.
        num_steps: ``m``, the number of Lanczos steps of every probe.
        num_probes: ``P``, the number of probes.
        num_products: number of products of ``H`` with a vector; each one takes a pass over all samples.
        parameters: mapping from names to shapes of the ``D`` parameters, in the order of the eigenvectors' entries.
        weight_norm: L2 norm of the ``D`` parameters together.
        num_samples: number of samples in one pass over the data.
        loss: mean loss over these samples.
        loss_name: name of the loss, as in :class:`FlatnessReport`.
        matrix: ``"hessian"``, or ``"gauss_newton"`` if ``H`` is the Gauss-Newton matrix.
        converged: whether every residual is at most twice the sum of ``tolerance |λ|`` and an allowance for rounding.
        seconds: wall time of the measurement; NaN if not known, as in files of earlier versions.

    Without probes (``num_probes=0``) the eigenvalues are the only result: the trace and the criteria are NaN, the kind
    is ``"unknown"``, and there is no density.

    Example:
        >>> from lightning_flatness import hessian_spectrum
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> result = hessian_spectrum(torch.nn.Linear(3, 2), [batch], top_k=2)
        >>> result.num_parameters, result.eigenvalues.shape, result.eigenvector(0)["weight"].shape
        (8, torch.Size([2]), torch.Size([2, 3]))
        >>> grid, density = result.density()
        >>> round(float(torch.trapezoid(density, grid)), 3)
        1.0
    """

    _short: ClassVar[tuple[str, ...]] = ("eigenvalues", "residuals", "ritz_values", "ritz_weights")

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
    seconds: float = math.nan

    @property
    def num_parameters(self) -> int:
        """``D``, the number of parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    def eigenvector(self, index: int) -> dict[str, Tensor]:
        """Return an eigenvector as a mapping from parameter names to tensors with the shapes of the parameters.

        The eigenvector with index 0 belongs to the largest eigenvalue.
        """
        sizes = [math.prod(shape) for shape in self.parameters.values()]
        pieces = self.eigenvectors[index].split(sizes)
        return {name: p.reshape(shape) for (name, shape), p in zip(self.parameters.items(), pieces, strict=True)}

    def density(self, grid: Tensor | None = None, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """Compute the spectral density as a sum of Gaussians, one for each Ritz value of each probe.

        Returns a grid of eigenvalues and the density at its points, float64 ``(n,)`` each. The integral of the density
        is one. ``sigma`` is the standard deviation of the Gaussians, in loss per squared weight; by default a hundredth
        of the range of the Ritz values. The default grid has 2,000 points, from ``4 sigma`` below the smallest Ritz
        value to ``4 sigma`` above the largest. See Ghorbani et al. 2019 (arXiv 1901.10159), Section 3.
        """
        if not self.num_probes:
            raise FlatnessError(NO_DENSITY)
        low, high = float(self.ritz_values.min()), float(self.ritz_values.max())
        sigma = default_sigma(low, high) if sigma is None else sigma
        if grid is None:
            grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, 2000, dtype=torch.float64, device="cpu")
        grid = grid.double()
        return grid, self.densities(grid, sigma).mean(0)

    def densities(self, grid: Tensor, sigma: float) -> Tensor:
        """Return the density at the points ``grid`` as each probe alone estimates it, float64 ``(P, n)``."""
        if not sigma > 0:
            raise FlatnessError(f"sigma={sigma!r} must be positive.")
        # The loop takes one probe at a time, to save memory.
        parts = [
            torch.exp(-((grid[:, None] - values) / sigma).square() / 2) @ weights / (sigma * math.sqrt(2 * math.pi))
            for values, weights in zip(self.ritz_values, self.ritz_weights, strict=True)
        ]
        return torch.stack(parts)

    def table(self) -> Table:
        """Return a ``rich`` table of eigenvalues, trace and criteria."""
        table = Table(
            title=f"Spectrum of the {MATRICES[self.matrix]}, {number_of(self.num_parameters, 'parameter')}, "
            f"{number_of(self.num_samples, 'sample')}",
            caption=f"Mean {self.loss_name} {self.loss:.4g}. {self._method()}"
            + ("" if self.converged else " Eigenvalues have not converged: allow more products (max_products=)."),
            caption_justify="left",
        )
        table.add_column("number")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("±", justify="right", no_wrap=True)
        for index, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1):
            table.add_row(f"λ{index}", f"{float(value):.6g}", f"{float(residual):.1g}")
        if not self.num_probes:
            return table
        table.add_row("trace", f"{self.trace:.5g}", _error(self.trace_stderr))
        for label, name in (("r_e", "r_e"), (f"K_Hn, n = {self.exponent:g}", "k_hn"), ("C_t", "c_t")):
            table.add_row(label, f"{getattr(self, name):.4g}", _error(self.spread[name]))
        others = self.spread["kind"]
        table.add_row("kind", self.kind, f"{others:.0%} of probes differ" if others else "all probes")
        return table

    def _method(self) -> str:
        """Return sentences with the numbers of probes, steps and products, and with the meaning of the errors."""
        products = number_of(self.num_products, "product")
        if not self.num_probes:
            return f"{products}; eigenvalues alone, without probes. ±: residual of eigenvalues."
        probes = f"{number_of(self.num_probes, 'probe')} of {number_of(self.num_steps, 'Lanczos step')}"
        return (
            f"{probes}, {products}; compare "
            "criteria at equal steps only. ±: standard error of the trace, standard deviation of the criteria over "
            "probes, residual of eigenvalues."
        )

    def __str__(self) -> str:
        return as_text(self.table())

    def _line(self) -> str:
        matrix, samples = MATRICES[self.matrix], number_of(self.num_samples, "sample")
        error = "" if math.isnan(self.trace_stderr) else f" (est. ± {self.trace_stderr:.1g})"
        largest = f"largest eigenvalue {float(self.eigenvalues[0]):.4g}, " if len(self.eigenvalues) else ""
        size = number_of(self.num_parameters, "parameter")
        trace = f"trace {self.trace:.4g}{error}, {self.kind}, " if self.num_probes else ""
        return f"{matrix}, {size}, {samples}, {largest}{trace}loss {self.loss:.4g}"

    def _rows(self) -> list[dict[str, Any]]:
        pairs = zip(self.eigenvalues.tolist(), self.residuals.tolist(), strict=True)
        shared = {name: getattr(self, name) for name in ("matrix", "num_samples", "loss", "loss_name", "converged")}
        return [
            {"index": index, "eigenvalue": value, "residual": residual, **shared}
            for index, (value, residual) in enumerate(pairs)
        ]


def _error(value: float) -> str:
    """Return a standard error or standard deviation as text, or a dash if it is NaN."""
    return "-" if math.isnan(value) else f"{value:.2g}"


def default_sigma(low: float, high: float) -> float:
    """Return the default standard deviation of the Gaussians for Ritz values from ``low`` to ``high``.

    It is a hundredth of ``high - low``. If both are equal, it is a hundredth of ``|high|``, or 0.01 if both are zero.
    """
    return (high - low or abs(high) or 1.0) / 100
