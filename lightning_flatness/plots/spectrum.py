"""Figures of the spectral density of a Hessian, and of its eigenvalues over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, label_epochs, plain_frame, plot_over_epochs
from lightning_flatness.results import SpectrumResult, number_of
from lightning_flatness.results.spectrum import MATRICES, default_sigma

DENSITY_COLOUR = "#1f5fa8"
EIGENVALUE_COLOUR = "#c2511b"
NEGATIVE_COLOUR = "#7a4fa3"
# Number of powers of ten over which the density is drawn. Lower values come from the Gaussians, not the spectrum.
DECADES = 7


def plot_density(result: SpectrumResult, *, sigma: float | None = None, ax: Any = None) -> tuple[Any, Any]:
    """Draw the spectral density on a logarithmic scale, and mark the largest eigenvalues on the horizontal axis.

    One eigenvalue among ``D`` is a bump of height ``1 / (D sigma √(2π))``, so outliers and bulk are visible together.
    By default ``sigma``, the standard deviation of the Gaussians in loss per squared weight, is a hundredth of the
    range of Ritz values and eigenvalues. See :meth:`~lightning_flatness.SpectrumResult.density`.
    """
    figure, ax = axes_or_new(ax, 7.0, 3.6)
    # After few Lanczos steps, eigenvalues can lie far outside the range of the Ritz values.
    values = torch.cat([result.ritz_values.flatten(), result.eigenvalues]).double()
    low, high = float(values.min()), float(values.max())
    sigma = default_sigma(low, high) if sigma is None else sigma
    margin = max(4 * sigma, (high - low) / 50)
    grid = torch.linspace(low - margin, high + margin, 2000, dtype=torch.float64, device="cpu")
    grid, density = result.density(grid, sigma)
    top = float(density.max())
    floor = top / 10**DECADES
    ax.fill_between(grid.numpy(), density.clamp(min=floor).numpy(), floor, color=DENSITY_COLOUR, alpha=0.18, lw=0)
    ax.plot(grid.numpy(), density.clamp(min=floor).numpy(), color=DENSITY_COLOUR, linewidth=1.2)
    ax.set(yscale="log", ylim=(floor, 3 * top), xlim=(float(grid[0]), float(grid[-1])))
    ax.axvline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    if number := len(result.eigenvalues):
        ax.plot(
            result.eigenvalues.numpy(),
            [0.0] * number,
            marker=2,  # in matplotlib, a tick that points upwards
            markersize=9,
            markeredgewidth=1.2,
            linestyle="none",
            color=EIGENVALUE_COLOUR,
            transform=ax.get_xaxis_transform(),
            label=f"{number} largest eigenvalues" if number > 1 else "largest eigenvalue",
        )
        ax.legend(frameon=False, fontsize=9, loc="upper right")
    ax.set_xlabel(f"eigenvalue of the {MATRICES[result.matrix]}  (loss per squared weight)")
    ax.set_ylabel("density")
    ax.set_title(
        f"{result.kind},  K_Hn = {result.k_hn:.2g},  C_t = {result.c_t:.2g}  "
        f"({number_of(result.num_probes, 'probe')} of {number_of(result.num_steps, 'step')})",
        fontsize=10,
        loc="left",
    )
    plain_frame(ax, "x")
    return figure, ax


def plot_eigenvalues(
    history: Iterable[tuple[float, SpectrumResult] | Mapping[str, Any]], *, ax: Any = None
) -> tuple[Any, Any]:
    """Draw the largest eigenvalues over the epochs, and the lowest Ritz value of all probes.

    The history consists of pairs of epoch and result, or of records of ``SpectrumCallback.history``, in any order.
    Eigenvalues can have both signs, so the vertical axis is linear near zero and logarithmic elsewhere.
    """
    records = sorted((_numbers(entry) for entry in history), key=lambda record: record[0])
    if not records:
        raise FlatnessError("plot_eigenvalues needs at least one pair (epoch, SpectrumResult).")
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    epochs = [epoch for epoch, _, _ in records]
    most = max(len(eigenvalues) for _, eigenvalues, _ in records)
    lowest = [value for _, _, value in records]
    for index in range(most):
        values = [eigenvalues[index] if index < len(eigenvalues) else None for _, eigenvalues, _ in records]
        others = "λ2" if most == 2 else f"λ2 to λ{most}"
        label = "λ1, the largest" if index == 0 else others if index == 1 else None
        alpha = 1.0 if index == 0 else max(0.25, 0.7 - 0.5 * index / most)
        line = {"color": EIGENVALUE_COLOUR, "alpha": alpha, "linewidth": 1.8 if index == 0 else 1.0}
        plot_over_epochs(ax, epochs, values, markersize=3.0, label=label, **line)
    line = {"color": NEGATIVE_COLOUR, "linestyle": "--"}
    plot_over_epochs(ax, epochs, lowest, markersize=3.0, label="lowest Ritz value", **line)
    ax.axhline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    sizes = [abs(value) for _, eigenvalues, low in records for value in (*eigenvalues, low)]
    largest = max((size for size in sizes if not math.isnan(size)), default=0.0)
    if largest > 0:
        ax.set_yscale("symlog", linthresh=largest / 100)
        ax.set_ylim(min(2 * min(lowest), -largest / 100), 2 * largest)
    label_epochs(ax, epochs)
    ax.set_ylabel("eigenvalue  (loss per squared weight)")
    ax.legend(frameon=False, fontsize=9)
    plain_frame(ax, "both")
    return figure, ax


def _numbers(entry: tuple[float, SpectrumResult] | Mapping[str, Any]) -> tuple[float, list[float], float]:
    """Return epoch, eigenvalues and lowest Ritz value."""
    if isinstance(entry, Mapping):
        return entry["epoch"], list(entry["eigenvalues"]), entry["lowest_ritz_value"]
    epoch, result = entry
    return epoch, result.eigenvalues.tolist(), float(result.ritz_values.min())
