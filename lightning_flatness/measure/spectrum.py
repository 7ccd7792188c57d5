"""Compute the spectrum of the Hessian of the mean loss over batches."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from lightning_flatness.checks import check_positive, check_whole, check_word
from lightning_flatness.errors import FlatnessError, LayerSelectionError
from lightning_flatness.functional import (
    Eigenpairs,
    Loss,
    Quadrature,
    lanczos_quadrature,
    spectrum_criteria,
    top_eigenpairs,
)
from lightning_flatness.measure.announcement import LOGGER, Announcement, Say
from lightning_flatness.measure.mean_hessian import MeanHessian
from lightning_flatness.measure.progress import progress_bar
from lightning_flatness.measure.ranks import own_rank
from lightning_flatness.model.hessian import LossCurvature
from lightning_flatness.model.isolation import isolated, without_wrapper
from lightning_flatness.model.options import MeasuringOptions, of_arguments
from lightning_flatness.model.whole import whole_model
from lightning_flatness.results import CRITERIA, SpectrumResult, number_of


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions(MeasuringOptions):
    """Options of :func:`hessian_spectrum`, which documents them."""

    params: str | Sequence[str] | None = None
    matrix: Literal["hessian", "gauss_newton"] = "hessian"
    top_k: int = 5
    num_steps: int = 30
    num_probes: int = 4
    exponent: float = 0.5
    tolerance: float | None = None
    max_products: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("matrix", self.matrix, ("hessian", "gauss_newton"))
        for name, least in {"top_k": 0, "num_steps": 1, "num_probes": 0, "max_products": 1, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)
        check_positive("exponent", self.exponent)
        check_positive("tolerance", self.tolerance, or_none=True)
        if not self.top_k and not self.num_probes:
            raise FlatnessError("top_k=0 and num_probes=0 leave nothing to compute. Increase one of the two numbers.")


def hessian_spectrum(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    params: str | Sequence[str] | None = None,
    matrix: Literal["hessian", "gauss_newton"] = "hessian",
    top_k: int = 5,
    num_steps: int = 30,
    num_probes: int = 4,
    exponent: float = 0.5,
    tolerance: float | None = None,
    max_products: int = 500,
    seed: int = 0,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    sync: bool = False,
    progress: bool | None = None,
) -> SpectrumResult:
    """Compute largest eigenvalues, trace, spectral density and criteria of the Hessian of the mean loss.

    Gabdullin's criteria compare the negative part of the spectrum with the positive part; their formulas are in
    :class:`~lightning_flatness.SpectrumResult`. The model is measured in evaluation mode and stays as it was.

    Every product of the Hessian with a vector is a pass over all batches, in which every sample has the same weight.
    The density needs ``num_probes * num_steps`` products, the eigenvalues at most ``max_products + top_k``. Unless a
    progress bar is shown, Python's logger ``lightning_flatness`` gets two messages. The first one states the number of
    products. The second one, after the first product, estimates the time; it is a warning if the estimate is more than
    a minute. Memory holds ``max(num_steps, 2 top_k + 20) + top_k`` vectors in the model's dtype, each with an entry for
    every parameter. It does not grow with batches or probes.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)`` that can be read many times with the same samples, as a list or a
            ``DataLoader``. A loader may shuffle, since random numbers are the same in every pass.
        loss: as for :func:`~lightning_flatness.measure_flatness`.
        label_smoothing: label smoothing of cross-entropy.
        class_weight: class weights of cross-entropy.
        ignore_index: target value that cross-entropy ignores.
        params: name or glob pattern of parameters or modules, such as ``"layer4.1.conv2"`` or ``"*.bias"``, or a list
            of names and patterns; None for all parameters. Frozen parameters (``requires_grad=False``) are always left
            out.
        matrix: ``"hessian"``, or ``"gauss_newton"``, which leaves out the second derivatives of the network. The
            Gauss-Newton matrix has no negative eigenvalues for the losses that are given by name.
        top_k: number of largest eigenvalues to compute, with their eigenvectors; 0 for none.
        num_steps: number of steps of the Lanczos method for every probe.
        num_probes: number of probes, which are vectors of random signs; 0 for eigenvalues alone, without density,
            trace and criteria. The defaults of 30 steps and 4 probes were tested on nine small networks. The
            1-Wasserstein distance between the density and the exact spectrum was below 0.9 % of the spectrum's range,
            and the error of the criterion ``c_t`` was below 0.001. The standard error of the trace is 1.6 times as
            large as with 10 probes.
        exponent: exponent ``n`` of the criterion ``K_Hn``.
        tolerance: largest residual ``‖H v - λ v‖`` of an eigenvalue ``λ``, relative to ``|λ|``; by default 1e-7 in
            float64 and 1e-4 in float32.
        max_products: maximal number of products in the search for eigenvalues. Their residuals take ``top_k`` more. If
            the search ends too early, ``result.converged`` is False.
        seed: seed of the probes.
        dtype: precision in which the model runs, as for ``measure_flatness``.
        sync: compute the Hessian over the batches of all ranks of a process group. Then call this function on every
            rank, with that rank's batches or with none. By default nothing communicates.
        progress: show a progress bar; by default only in a terminal.

    Raises:
        FlatnessError: an option is invalid, or there is nothing to compute.
        LayerSelectionError: a parameter does not exist, all parameters are frozen, the forward pass has no second
            derivative, or two forward passes on the same samples give different logits.
        BatchError: batches can be read only once, differ between passes, are missing, or cannot be measured.

    Source:
        Gabdullin 2024 (arXiv 2412.10146) and 2025 (arXiv 2504.17618) for the criteria; Ghorbani, Krishnan and Xiao 2019
        (arXiv 1901.10159) for the density.

    Example:
        >>> net, batch = nn.Linear(2, 1, bias=False), (torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))
        >>> result = hessian_spectrum(net, [batch], loss="mse", top_k=2, dtype="float64")
        >>> result.eigenvalues, result.kind
        (tensor([9.0000, 1.0000], dtype=torch.float64), 'mainly positive')
    """
    options = of_arguments(SpectrumOptions, locals())
    return spectrum_of(whole_model(model) if sync else model, batches, options, progress, sync)


def spectrum_of(
    model: nn.Module,
    batches: Iterable[Any],
    options: SpectrumOptions,
    progress: bool | None,
    sync: bool,
    say: Say | None = LOGGER.log,
) -> SpectrumResult:
    """Compute a spectrum as :func:`hessian_spectrum` does, from options that have been checked.

    If no progress bar is shown, ``say`` gets the messages about products and time, on rank zero. If ``say`` is None,
    there are no messages.
    """
    start = time.perf_counter()
    model = without_wrapper(model)
    with isolated(model), torch.no_grad():
        curvature = LossCurvature(model, options.loss_function, options.params, options.matrix, options.measuring_dtype)
        hessian = MeanHessian(model, curvature, batches, sync)
        size, rounding = curvature.size, torch.finfo(curvature.dtype).eps
        top_k, num_steps = min(options.top_k, size), min(options.num_steps, size)
        rows = min(max(num_steps if options.num_probes else 0, 2 * top_k + 20), size)
        basis = torch.empty(rows, size, dtype=curvature.dtype, device=curvature.device)
        generator = torch.Generator().manual_seed(options.seed)
        tolerance = options.tolerance or (1e-7 if curvature.dtype == torch.float64 else 1e-4)
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        top = Eigenpairs(none, basis[:0].clone(), none, 0)
        probes, traces = [], []
        with progress_bar(progress) as bar:
            is_heard = own_rank(sync) == 0 and bar.disable
            announcement = _announcement(options, top_k, num_steps, hessian.num_samples, say if is_heard else None)
            announcement.begin()
            each = announcement.timing_first(hessian)
            if top_k:
                product = _advancing(bar, "Eigenvalues", options.max_products + top_k, each)
                top = top_eigenpairs(product, basis, top_k, generator, tolerance, options.max_products)
                _certify_symmetric(top, rounding)
            if options.num_probes:
                product = _advancing(bar, "Density", options.num_probes * num_steps, each)
            for _ in range(options.num_probes):
                probe = torch.randint(2, (size,), generator=generator, device="cpu").mul(2).sub(1).to(basis)
                probes.append(lanczos_quadrature(product, probe, basis[:num_steps], generator))
                _certify_symmetric(probes[-1], rounding)
                traces.append(_trace(probes[-1], probe, top))
    values, weights = (
        torch.stack([getattr(probe, name) for probe in probes]) if probes else none.reshape(0, 0)
        for name in ("values", "weights")
    )
    largest = torch.cat([values.flatten(), top.values]).abs().max()
    accuracy = tolerance * top.values.abs() + 100 * rounding * largest
    return SpectrumResult(
        eigenvalues=top.values,
        eigenvectors=top.vectors.cpu(),
        residuals=top.residuals,
        trace=sum(traces) / len(traces) if traces else math.nan,
        trace_stderr=_deviation(torch.tensor(traces, dtype=torch.float64, device="cpu")) / math.sqrt(len(traces) or 1),
        ritz_values=values,
        ritz_weights=weights,
        **_criteria(values, weights, options.exponent, curvature.weight_norm, rounding),
        exponent=options.exponent,
        num_steps=values.shape[1],
        num_probes=len(probes),
        num_products=hessian.num_products,
        parameters=curvature.shapes,
        weight_norm=curvature.weight_norm,
        num_samples=hessian.num_samples,
        loss=hessian.loss,
        loss_name=options.loss_function.label,
        matrix=options.matrix,
        converged=bool((top.residuals <= 2 * accuracy).all()),
        seconds=time.perf_counter() - start,
    )


def _announcement(
    options: SpectrumOptions, top_k: int, num_steps: int, num_samples: int, say: Say | None
) -> Announcement:
    """Return the announcement of how many products a spectrum needs.

    The number of products for the eigenvalues is an estimate, which comes from experiments with networks.
    """
    density = options.num_probes * num_steps
    eigenvalues = min(options.max_products, 15 + 8 * top_k) + top_k if top_k else 0
    parts = [f"{density} for the density"] * bool(density)
    if top_k:
        most = options.max_products + top_k
        parts.append(f"about {eigenvalues}, at most {most}, for {number_of(top_k, 'eigenvalue')}")
    passes = f"each a pass forward and back over {number_of(num_samples, 'sample')}"
    cheaper = ["num_probes= (0 for eigenvalues alone)", "num_steps="] * bool(density) + ["top_k="] * bool(top_k)
    return Announcement(
        "spectrum",
        density + eigenvalues,
        f"{density + eigenvalues} products with the Hessian ({' and '.join(parts)}), {passes}",
        f"{', '.join(cheaper)}, or fewer samples",
        say,
    )


def _criteria(values: Tensor, weights: Tensor, exponent: float, weight_norm: float, rounding: float) -> dict[str, Any]:
    """Return the criteria of a spectrum as fields of :class:`~lightning_flatness.SpectrumResult`.

    Every criterion is averaged over the probes, and ``kind``, such as ``"mainly positive"``, is the most frequent kind
    among them. ``spread`` has the standard deviation of every criterion over the probes, and the share of probes with
    another kind. ``values`` and ``weights`` are the Ritz values and weights of the probes, ``(probes, steps)``. Without
    probes, all numbers are NaN.
    """
    if not len(values):
        unknown = dict.fromkeys(CRITERIA, math.nan)
        return {**unknown, "kind": "unknown", "spread": unknown | {"kind": math.nan}}
    criteria = spectrum_criteria(values, weights, exponent, weight_norm**2, zero=10 * rounding)
    kind, agreeing = Counter(criteria.kinds).most_common(1)[0]
    each = {name: getattr(criteria, name) for name in CRITERIA}
    spread = {name: _deviation(numbers) for name, numbers in each.items()} | {"kind": 1 - agreeing / len(values)}
    return {**{name: float(numbers.mean()) for name, numbers in each.items()}, "kind": kind, "spread": spread}


def _trace(quadrature: Quadrature, probe: Tensor, top: Eigenpairs) -> float:
    """Estimate the trace of the matrix ``A`` from one probe.

    The estimate is the sum of the eigenvalues ``λ`` in ``top``, plus Hutchinson's estimate for the rest,
    ``A - Σ λ v vᵀ`` with the eigenvectors ``v``. The eigenvectors do not depend on the probe, so the estimate is
    unbiased even if they have not converged.
    """
    size = len(probe)
    overlaps = (top.vectors @ (probe / math.sqrt(size))).double().cpu().square()
    return size * quadrature.rayleigh - float((top.values * (size * overlaps - 1)).sum())


def _certify_symmetric(found: Quadrature | Eigenpairs, rounding: float) -> None:
    """Raise an error if the products with vectors show that the matrix is not symmetric, as a Hessian must be."""
    if found.asymmetry > 10 * math.sqrt(rounding):
        raise LayerSelectionError(
            f"Products with the Hessian are not symmetric (relative difference {found.asymmetry:.0e}), so they are "
            "wrong. The cause may be torch's parametrizations.weight_norm, an autograd.Function whose backward is not "
            "its derivative, or noise in the forward pass. Remove the cause, or choose with params= only layers that "
            "come after it."
        )


def _deviation(numbers: Tensor) -> float:
    """Return the standard deviation of numbers; NaN for fewer than two."""
    return float(numbers.std()) if len(numbers) > 1 else math.nan


def _advancing(bar: Progress, name: str, total: int, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the same as ``product`` and advances a new task of the progress bar."""
    task = bar.add_task(name, total=total)

    def advancing(vector: Tensor) -> Tensor:
        image = product(vector)
        bar.advance(task)
        return image

    return advancing
