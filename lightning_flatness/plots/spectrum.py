"""The spectral density of a Hessian, and its eigenvalues over the epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_epochs
from lightning_flatness.results import SpectrumResult, number_of

DENSITY_COLOUR = "#1f5fa8"
EIGENVALUE_COLOUR = "#c2511b"
NEGATIVE_COLOUR = "#7a4fa3"
# The density is drawn over so many powers of ten: what is below is a Gaussian's flank, not a spectrum's.
DECADES = 7


def plot_density(result: SpectrumResult, *, sigma: float | None = None, ax: Any | None = None) -> tuple[Any, Any]:
    """Draw the spectral density on a logarithmic scale, with the largest eigenvalues as ticks on the axis.

    One eigenvalue among ``D`` is a bump of height ``1 / (D sigma √(2π))``, so outliers and bulk show together.

    Args:
        result: of :func:`~lightning_flatness.hessian_spectrum`.
        sigma: of the Gaussians, see :meth:`~lightning_flatness.SpectrumResult.density`; by default a hundredth of the
            range of Ritz values and eigenvalues.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: ``sigma`` is not positive, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import hessian_spectrum
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> figure, ax = plot_density(hessian_spectrum(torch.nn.Linear(3, 2), [batch], top_k=2))
        >>> ax.get_yscale()
        'log'
    """
    figure, ax = axes_or_new(ax, 7.0, 3.6)
    # With few steps, eigenvalues lie far outside of the Ritz values.
    values = torch.cat([result.ritz_values.flatten(), result.eigenvalues]).double()
    low, high = float(values.min()), float(values.max())
    if sigma is None:
        sigma = (high - low or abs(high) or 1.0) / 100
    margin = max(4 * sigma, (high - low) / 50)
    grid = torch.linspace(low - margin, high + margin, 2000, dtype=torch.float64)
    grid, density = result.density(grid, sigma)
    top = float(density.max())
    floor = top / 10**DECADES
    ax.fill_between(grid.numpy(), density.clamp(min=floor).numpy(), floor, color=DENSITY_COLOUR, alpha=0.18, lw=0)
    ax.plot(grid.numpy(), density.clamp(min=floor).numpy(), color=DENSITY_COLOUR, linewidth=1.2)
    ax.set_yscale("log")
    ax.set_ylim(floor, 3 * top)
    ax.set_xlim(float(grid[0]), float(grid[-1]))
    ax.axvline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    if len(result.eigenvalues):
        ax.plot(
            result.eigenvalues.numpy(),
            [0.0] * len(result.eigenvalues),
            marker=2,  # a tick upwards
            markersize=9,
            markeredgewidth=1.2,
            linestyle="none",
            color=EIGENVALUE_COLOUR,
            transform=ax.get_xaxis_transform(),
            label=_largest(len(result.eigenvalues)),
        )
        ax.legend(frameon=False, fontsize=9, loc="upper right")
    matrix = "Hessian" if result.matrix == "hessian" else "Gauss-Newton matrix"
    ax.set_xlabel(f"eigenvalue of the {matrix}  (loss per squared weight)")
    ax.set_ylabel("density")
    ax.set_title(
        f"{result.kind},  K_Hn = {result.k_hn:.2g},  C_t = {result.c_t:.2g}  "
        f"({number_of(result.num_probes, 'probe')} of {number_of(result.num_steps, 'step')})",
        fontsize=10,
        loc="left",
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", alpha=0.25, linewidth=0.6)
    return figure, ax


def plot_eigenvalues(
    history: Iterable[tuple[float, SpectrumResult] | Mapping[str, Any]], *, ax: Any | None = None
) -> tuple[Any, Any]:
    """Draw the largest eigenvalues over the epochs, and the most negative Ritz value of all probes.

    The axis is linear near zero and logarithmic beyond, since eigenvalues have both signs.

    Args:
        history: pairs of epoch and result, in any order; or the records of ``SpectrumCallback.history``.
        ax: draw here instead of in a new figure.

    Returns:
        The figure and the axes.

    Raises:
        FlatnessError: no results, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import hessian_spectrum
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> result = hessian_spectrum(torch.nn.Linear(3, 2), [batch], top_k=2)
        >>> figure, ax = plot_eigenvalues([(0, result), (1, result)])
        >>> len(ax.get_lines())
        4
    """
    records = sorted((_numbers(entry) for entry in history), key=lambda record: record[0])
    if not records:
        raise FlatnessError("plot_eigenvalues needs one (epoch, SpectrumResult) at least.")
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    epochs = [epoch for epoch, _, _ in records]
    marker = "o" if len(epochs) <= 40 else None
    most = max(len(eigenvalues) for _, eigenvalues, _ in records)
    lowest = [value for _, _, value in records]
    sizes = [abs(value) for value in lowest]
    for index in range(most):
        values = [found[index] if index < len(found) else float("nan") for _, found, _ in records]
        sizes += [abs(value) for value in values]
        others = "λ2" if most == 2 else f"λ2 to λ{most}"
        label = "λ1, the largest" if index == 0 else others if index == 1 else None
        alpha = 1.0 if index == 0 else max(0.25, 0.7 - 0.5 * index / most)
        line = {"color": EIGENVALUE_COLOUR, "alpha": alpha, "linewidth": 1.8 if index == 0 else 1.0}
        ax.plot(epochs, values, marker=marker, markersize=3.0, label=label, **line)
    ax.plot(
        epochs, lowest, color=NEGATIVE_COLOUR, marker=marker, markersize=3.0, linestyle="--", label="lowest Ritz value"
    )
    ax.axhline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    largest = max((size for size in sizes if size == size), default=0.0)
    if largest > 0:
        ax.set_yscale("symlog", linthresh=largest / 100)
        ax.set_ylim(min(2 * min(lowest), -largest / 100), 2 * largest)
    label_epochs(ax, epochs)
    ax.set_ylabel("eigenvalue  (loss per squared weight)")
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="both", alpha=0.25, linewidth=0.6)
    return figure, ax


def _largest(number: int) -> str:
    return "largest eigenvalue" if number == 1 else f"{number} largest eigenvalues"


def _numbers(entry: tuple[float, SpectrumResult] | Mapping[str, Any]) -> tuple[float, list[float], float]:
    """Epoch, eigenvalues, lowest Ritz value."""
    if isinstance(entry, Mapping):
        return entry["epoch"], list(entry["eigenvalues"]), entry["lowest_ritz_value"]
    epoch, result = entry
    return epoch, result.eigenvalues.tolist(), float(result.ritz_values.min())
