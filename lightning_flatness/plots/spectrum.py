"""Draw the spectral density of a Hessian, and its largest eigenvalues over the epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import (
    LEGEND_SIZE,
    MARKERS,
    SERIES,
    axes_or_new,
    label_epochs,
    overlays,
    plain_frame,
    plot_over_epochs,
    set_heading,
    set_joint_heading,
    short,
)
from lightning_flatness.plots.words import finite
from lightning_flatness.results import SpectrumResult, number_of
from lightning_flatness.results.spectrum import MATRICES, NO_DENSITY, default_sigma
from lightning_flatness.results.texts import measured, samples_of

EIGENVALUE_COLOUR = SERIES[1]
LOWEST_COLOUR = SERIES[0]
# The density is drawn over this many powers of ten. Lower values come only from the tails of the Gaussians that smooth
# the spectrum.
DECADES = 7
PAIRS = "pairs (epoch, SpectrumResult), or the history of a SpectrumCallback"


def plot_density(
    result: SpectrumResult,
    *,
    sigma: float | None = None,
    label: str | None = None,
    color: Any = None,
    data: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the spectral density on a logarithmic scale, and mark the largest eigenvalues on the horizontal axis.

    The density is a sum of Gaussians with standard deviation ``sigma``. A single eigenvalue of a matrix with ``D``
    eigenvalues is a bump of height ``1 / (D sigma √(2π))``, which the logarithmic scale makes visible. The density is
    estimated from random vectors (probes). If there are several, a band shows the range of their estimates. The curve
    is dashed if the matrix is a Gauss-Newton matrix.

    Args:
        result: the spectrum.
        sigma: standard deviation of the Gaussians, in loss per squared weight. By default a hundredth of the range of
            all Ritz values and eigenvalues (see :meth:`~lightning_flatness.SpectrumResult.density`). Give the same
            ``sigma`` to all spectra that are compared.
        label: name of the spectrum for the legend. To compare spectra, draw them into the same ``ax``, each with its
            own ``label``.
        color: colour of the curve and, if a ``label`` is given, of the marks of the eigenvalues.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: the spectrum has no density (``num_probes=0``) or values that are not finite, ``sigma`` is not
            positive, or matplotlib is missing.

    Source:
        Ghorbani et al. 2019 (arXiv 1901.10159).

    Example:
        >>> import torch
        >>> from lightning_flatness import hessian_spectrum
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> figure, ax = plot_density(hessian_spectrum(net, [batch], top_k=2))
        >>> ax.get_xlabel(), ax.get_yscale()
        ('eigenvalue of the Hessian  (loss per squared weight)', 'log')
    """
    check_type("result", result, SpectrumResult, "a SpectrumResult")
    if not result.num_probes:
        raise FlatnessError(NO_DENSITY)
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    index = len(overlays(ax, "density"))
    color = color or SERIES[index % len(SERIES)]
    # After few Lanczos steps, the largest eigenvalues can lie far outside the range of the Ritz values.
    values = torch.cat([result.ritz_values.flatten(), result.eigenvalues]).double()
    if not bool(values.isfinite().all()):
        raise FlatnessError(
            "The spectrum has eigenvalues or Ritz values that are not finite, so it has no density to draw."
        )
    low, high = float(values.min()), float(values.max())
    sigma = default_sigma(low, high) if sigma is None else sigma
    margin = max(4 * sigma, (high - low) / 50)
    grid = torch.linspace(low - margin, high + margin, 2000, dtype=torch.float64, device="cpu")
    of_probes = result.densities(grid, sigma)
    density = of_probes.mean(0)
    top = float(density.max())
    floor = top / 10**DECADES
    if len(of_probes) > 1:
        edges = [edge.clamp(min=floor / 100).numpy() for edge in (of_probes.amin(0), of_probes.amax(0))]
        name = f"range over {number_of(result.num_probes, 'probe')}" if label is None else None
        ax.fill_between(grid.numpy(), *edges, color=color, alpha=0.25, linewidth=0, label=name)
    marker = (
        {} if label is None else {"marker": MARKERS[index % 4], "markevery": (100 + 60 * index, 400), "markersize": 4}
    )
    words = (
        f"density, σ = {short(float(f'{sigma:.2g}'))}"
        if label is None
        else f"{label}: {_loss(result, data)}, {_criterion(result)}"
    )
    dashes = "-" if result.matrix == "hessian" else "--"
    curve = {"color": color, "linewidth": 1.3, "linestyle": dashes, **marker}
    (drawn,) = ax.plot(grid.numpy(), density.clamp(min=floor / 1e3).numpy(), label=words, **curve)
    limits = {"x": (float(grid[0]), float(grid[-1])), "y": (floor, 3 * top)}
    if index:  # keep the densities that were drawn before within the limits
        before = {"x": ax.get_xlim(), "y": ax.get_ylim()}
        limits = {name: (min(pair[0], before[name][0]), max(pair[1], before[name][1])) for name, pair in limits.items()}
    ax.set(yscale="log", ylim=limits["y"], xlim=limits["x"])
    ax.axvline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    if number := len(result.eigenvalues):
        name = f"{number} largest eigenvalues" if number > 1 else "largest eigenvalue"
        ax.plot(
            result.eigenvalues.numpy(),
            [0.04 * index] * number,
            marker=2,  # in matplotlib, a tick that points upwards
            markersize=9,
            markeredgewidth=1.4,
            linestyle="none",
            color=EIGENVALUE_COLOUR if label is None else color,
            transform=ax.get_xaxis_transform(),
            label=name if label is None else None,
        )
    ax.legend(frameon=False, fontsize=LEGEND_SIZE, loc="upper right")
    ax.set_xlabel(f"eigenvalue of the {MATRICES[result.matrix]}  (loss per squared weight)")
    ax.set_ylabel("density")
    if label is None:
        set_heading(ax, *_heading(result, data))
    else:
        set_joint_heading(ax, "density", drawn, f"{_size(result)}; σ = {short(float(f'{sigma:.2g}'))}")
    plain_frame(ax, "x")
    return figure, ax


def _loss(result: SpectrumResult, data: str | None) -> str:
    return f"{result.loss_name} {result.loss:.3g} on {samples_of(result.num_samples, data)}"


def _size(result: SpectrumResult) -> str:
    probes = f"{number_of(result.num_probes, 'probe')} of {number_of(result.num_steps, 'step')}"
    return f"{number_of(result.num_parameters, 'parameter')}; {probes}"


def _criterion(result: SpectrumResult) -> str:
    return f"K_Hn = {measured(result.k_hn, result.spread['k_hn'])}"


def _heading(result: SpectrumResult, data: str | None) -> tuple[str, str, str]:
    """Return the three lines of the title.

    Line 1 has the numbers of parameters, probes and steps, the loss and the data. Line 2 has the kind of spectrum, the
    trace and the criteria, with errors. Line 3 explains the errors, and warns of eigenvalues that have not converged.
    """
    trace = f"trace {measured(result.trace, result.trace_stderr)}"
    criteria = f"{_criterion(result)}, C_t = {measured(result.c_t, result.spread['c_t'])}"
    errors = "±: standard error of the trace, standard deviation of the criteria over probes"
    missing = [] if result.converged else ["eigenvalues have not converged"]
    return (
        f"{_size(result)}; {_loss(result, data)}",
        f"{result.kind}; {trace}, {criteria}",
        "; ".join([errors] * (result.num_probes > 1) + missing),
    )


def plot_eigenvalues(
    history: Iterable[tuple[float, SpectrumResult] | Mapping[str, Any]], *, data: str | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Draw the largest eigenvalues over the epochs, and the lowest Ritz value of all random probes.

    The lowest Ritz value is an upper bound on the lowest eigenvalue. The vertical axis is linear near zero and
    logarithmic elsewhere, because eigenvalues can have both signs. Where the largest eigenvalues have not converged,
    their markers are hollow and their curves are dashed.

    Args:
        history: pairs of an epoch and a :class:`~lightning_flatness.SpectrumResult`, or records of
            ``SpectrumCallback.history``, in any order.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: the history is empty, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import hessian_spectrum
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> spectrum = hessian_spectrum(net, [batch], top_k=2)
        >>> figure, ax = plot_eigenvalues([(0, spectrum), (1, spectrum)])
        >>> ax.get_xlabel()
        'epoch'
    """
    check_type("history", history, Iterable, PAIRS)
    records = sorted((_numbers(entry) for entry in history), key=lambda record: record["epoch"])
    if not records:
        raise FlatnessError("The history is empty. Give plot_eigenvalues at least one pair (epoch, SpectrumResult).")
    figure, ax = axes_or_new(ax, 7.0, 4.0)
    epochs = [record["epoch"] for record in records]
    converged = [record.get("converged") is not False for record in records]
    most = max(len(record["eigenvalues"]) for record in records)
    lowest = [record.get("lowest_ritz_value") for record in records]  # None without probes
    known_lowest = finite(lowest)
    for index in range(most):
        values = [dict(enumerate(record["eigenvalues"])).get(index) for record in records]
        others = "λ2" if most == 2 else f"λ2 to λ{most}"
        label = "λ1, the largest" if index == 0 else others if index == 1 else None
        alpha = 1.0 if index == 0 else max(0.25, 0.7 - 0.5 * index / most)
        line: dict[str, Any] = {"color": EIGENVALUE_COLOUR, "alpha": alpha, "linewidth": 1.8 if index == 0 else 1.0}
        plot_over_epochs(ax, epochs, values, converged, markersize=3.5, label=label, **line)
    if known_lowest:
        line = {"color": LOWEST_COLOUR, "marker": "v", "linestyle": "-."}
        label = "lowest Ritz value (bounds the lowest eigenvalue)"
        plot_over_epochs(ax, epochs, lowest, markersize=4.0, label=label, **line)
    ax.axhline(0.0, color="0.5", linewidth=0.7, linestyle=":")
    sizes = map(abs, [*finite(value for record in records for value in record["eigenvalues"]), *known_lowest])
    largest = max(sizes, default=0.0)
    if largest > 0:
        _scale(ax, min(2 * min(known_lowest, default=0.0), -largest / 100), 2 * largest, largest / 100)
    label_epochs(ax, epochs)
    ax.set_ylabel("eigenvalue  (loss per squared weight)")
    ax.legend(frameon=False, fontsize=LEGEND_SIZE)
    where = samples_of(records[-1].get("num_samples") or 0, data)
    set_heading(
        ax,
        f"Largest eigenvalues of the {MATRICES[records[-1].get('matrix', 'hessian')]}"
        + (f"; {where}" if where else ""),
        "" if all(converged) else "hollow: eigenvalues have not converged",
    )
    plain_frame(ax, "both")
    return figure, ax


def _scale(ax: Any, low: float, high: float, threshold: float) -> None:
    """Make the vertical axis linear between ``-threshold`` and ``threshold`` and logarithmic beyond.

    Labels are at zero and at powers of ten.
    """
    ax.set_yscale("symlog", linthresh=threshold)
    ax.set_ylim(low, high)
    powers = [10.0**power for power in range(-30, 31) if 10.0**power >= threshold]
    ticks = [tick for tick in (*(-power for power in powers), 0.0, *powers) if low <= tick <= high]
    ax.set_yticks(
        sorted(ticks), [short(tick).replace("-", "−", 1) if tick < 0 else short(tick) for tick in sorted(ticks)]
    )
    ax.yaxis.minorticks_off()


def _numbers(entry: tuple[float, SpectrumResult] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry of a history as a record, such as those of ``SpectrumCallback.history``."""
    if isinstance(entry, Mapping):
        return entry
    check_type("An entry of the history", entry, (tuple, list), PAIRS)
    epoch, result = entry
    return {
        "epoch": epoch,
        "eigenvalues": result.eigenvalues.tolist(),
        "lowest_ritz_value": float(result.ritz_values.min()) if result.num_probes else None,
        "converged": result.converged,
        "num_samples": result.num_samples,
        "matrix": result.matrix,
    }
