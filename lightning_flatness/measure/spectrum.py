"""From batches to the spectrum of the Hessian."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.checks import check_positive, check_whole, check_word
from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional import (
    Eigenpairs,
    Loss,
    Quadrature,
    lanczos_quadrature,
    spectrum_criteria,
    top_eigenpairs,
)
from lightning_flatness.measure.batches import batches_on, split_batch
from lightning_flatness.measure.progress import progress_bar
from lightning_flatness.measure.ranks import sum_over_ranks
from lightning_flatness.model.hessian import LossCurvature, LossSums
from lightning_flatness.model.isolation import differentiable, random_states_kept
from lightning_flatness.model.options import MeasuringOptions
from lightning_flatness.results import CRITERIA, SpectrumResult


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions(MeasuringOptions):
    """Options of :func:`hessian_spectrum`, which explains them.

    Raises:
        FlatnessError: an option that is not possible.

    Example:
        >>> SpectrumOptions(top_k=3).num_steps
        50
    """

    params: str | Sequence[str] | None = None
    matrix: Literal["hessian", "gauss_newton"] = "hessian"
    top_k: int = 5
    num_steps: int = 50
    num_probes: int = 10
    exponent: float = 0.5
    tolerance: float | None = None
    max_products: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("matrix", self.matrix, ("hessian", "gauss_newton"))
        for name, least in {"top_k": 0, "num_steps": 1, "num_probes": 1, "max_products": 1, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)
        check_positive("exponent", self.exponent)
        check_positive("tolerance", self.tolerance, or_none=True)


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
    num_steps: int = 50,
    num_probes: int = 10,
    exponent: float = 0.5,
    tolerance: float | None = None,
    max_products: int = 500,
    seed: int = 0,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    progress: bool | None = None,
) -> SpectrumResult:
    """Largest eigenvalues, trace, spectral density and criteria of the Hessian of the mean loss over all batches.

    The model is measured in evaluation mode and left as it was. Every product of the Hessian with a vector is a pass
    over all batches, exactly weighted; there are ``num_probes * num_steps`` of them for the density, and up to
    ``max_products + top_k`` for the eigenvalues. Kept are ``max(num_steps, 2 top_k + 20) + top_k`` vectors as long as
    all parameters together, in the model's type, and nothing that grows with batches or probes. In a process group of
    ``torch.distributed`` every rank gives its own batches, or none: call it on every rank or on none.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)`` that can be read many times, a list or a ``DataLoader``, the same samples
            each time. (The random state is the same in every pass, so a loader may shuffle.)
        loss: as for :func:`~lightning_flatness.measure_flatness`; so are the next three.
        label_smoothing: of cross-entropy.
        class_weight: of cross-entropy.
        ignore_index: of cross-entropy.
        params: names or glob patterns, or a list of them, of parameters or modules, ``"layer4.1.conv2"`` or
            ``"*.bias"``; None for all. Frozen parameters (``requires_grad=False``) are left out always.
        matrix: ``"hessian"``, or ``"gauss_newton"``, which leaves out the curvature of the network itself and is never
            negative for the losses known by name.
        top_k: how many of the largest eigenvalues, with eigenvectors; 0 for none.
        num_steps: of the Lanczos method, for every probe.
        num_probes: random vectors of signs.
        exponent: ``n`` of ``K_Hn``.
        tolerance: of the eigenvalues' residuals, relative to them; by default 1e-7 in float64 and 1e-4 in float32.
        max_products: for the eigenvalues; then ``result.converged`` is False, and the residuals tell how good they are.
        seed: of the probes.
        dtype: ``"float32"`` or ``"float64"``, to run copies of weights and batches in; by default the model's own, at
            least float32.
        progress: show a progress bar; by default in a terminal.

    Returns:
        A :class:`~lightning_flatness.SpectrumResult`.

    Raises:
        FlatnessError: options that cannot be.
        LayerSelectionError: no such parameter, all are frozen, or the forward has no second derivative.
        BatchError: batches that cannot be read twice or differ from pass to pass, are missing, or cannot be measured.

    Source:
        Gabdullin 2024 (arXiv 2412.10146) and 2025 (arXiv 2504.17618) for the criteria; Ghorbani, Krishnan and Xiao 2019
        (arXiv 1901.10159) for the density.

    Example:
        >>> net, batch = nn.Linear(2, 1, bias=False), (torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))
        >>> result = hessian_spectrum(net, [batch], loss="mse", top_k=2, dtype="float64")
        >>> result.eigenvalues, result.kind
        (tensor([9.0000, 1.0000], dtype=torch.float64), 'mainly positive')
    """
    options = SpectrumOptions(
        loss=loss,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        params=params,
        matrix=matrix,
        top_k=top_k,
        num_steps=num_steps,
        num_probes=num_probes,
        exponent=exponent,
        tolerance=tolerance,
        max_products=max_products,
        seed=seed,
        dtype=dtype,
    )
    return spectrum_of(model, batches, options, progress)


def spectrum_of(
    model: nn.Module, batches: Iterable[Any], options: SpectrumOptions, progress: bool | None = None
) -> SpectrumResult:
    """:func:`hessian_spectrum` with options that have been checked."""
    if isinstance(batches, Iterator):
        raise BatchError(
            f"The batches are a {type(batches).__name__}, which can be read only once, and every product with the "
            "Hessian reads them all. Give a DataLoader, or list(batches)."
        )
    num_probes, num_steps = options.num_probes, options.num_steps
    with random_states_kept(model), differentiable(model), torch.no_grad():
        curvature = LossCurvature(model, options.loss_function, options.params, options.matrix, options.measuring_dtype)
        operator = _MeanOperator(model, curvature, batches)
        size, precise = curvature.size, curvature.dtype == torch.float64
        top_k = min(options.top_k, size)
        rows = min(max(num_steps, 2 * top_k + 20), size)
        basis = torch.empty(rows, size, dtype=curvature.dtype, device=curvature.device)
        generator = torch.Generator().manual_seed(options.seed)
        tolerance = (1e-7 if precise else 1e-4) if options.tolerance is None else options.tolerance
        found = Eigenpairs(torch.zeros(0).double(), basis[:0].clone(), torch.zeros(0).double(), 0)
        with progress_bar(progress) as bar:
            if top_k:
                operator.tell = _teller(bar, "Eigenvalues", options.max_products + top_k)
                found = top_eigenpairs(operator, basis, top_k, generator, tolerance, options.max_products)
            operator.tell = _teller(bar, "Density", num_probes * min(num_steps, size))
            probes, traces = [], []
            for _ in range(num_probes):
                probe = torch.randint(2, (size,), generator=generator, device="cpu").mul(2).sub(1).to(basis)
                probes.append(lanczos_quadrature(operator, probe, basis[:num_steps], generator))
                _certify_symmetric(probes[-1], curvature.dtype)
                traces.append(_trace(probes[-1], probe, found))
    values, weights = torch.stack([p.values for p in probes]), torch.stack([p.weights for p in probes])
    zero = 10 * torch.finfo(curvature.dtype).eps
    criteria = spectrum_criteria(values, weights, options.exponent, curvature.weight_norm**2, zero)
    kind, agreeing = Counter(criteria.kinds).most_common(1)[0]
    each = {name: getattr(criteria, name) for name in CRITERIA}
    accuracy = tolerance * found.values.abs() + 100 * torch.finfo(curvature.dtype).eps * values.abs().max()
    return SpectrumResult(
        eigenvalues=found.values,
        eigenvectors=found.vectors.cpu(),
        residuals=found.residuals,
        trace=sum(traces) / num_probes,
        trace_stderr=_deviation(torch.tensor(traces, dtype=torch.float64)) / math.sqrt(num_probes),
        ritz_values=values,
        ritz_weights=weights,
        **{name: float(numbers.mean()) for name, numbers in each.items()},
        kind=kind,
        spread={name: _deviation(numbers) for name, numbers in each.items()} | {"kind": 1 - agreeing / num_probes},
        exponent=options.exponent,
        num_steps=values.shape[1],
        num_probes=num_probes,
        num_products=operator.num_products,
        parameters=curvature.shapes,
        weight_norm=curvature.weight_norm,
        num_samples=operator.num_samples,
        loss=operator.loss,
        loss_name=options.loss_function.name,
        matrix=options.matrix,
        converged=bool((found.residuals <= 2 * accuracy).all()),
    )


class _MeanOperator:
    """Products of the matrix of the mean loss over all batches of all ranks with vectors."""

    def __init__(self, model: nn.Module, curvature: LossCurvature, batches: Iterable[Any]) -> None:
        self._model, self._curvature, self._batches = model, curvature, batches
        self.tell: Callable[[], None] = lambda: None
        self.num_products = 0
        loss, normalizer, num_samples = self._pass(None)[:3].tolist()
        if not normalizer > 0:
            raise BatchError("No sample was measured, so there is no spectrum. Is the data set empty?")
        self._loss, self._normalizer, self.num_samples = loss, normalizer, round(num_samples)
        self.loss = loss / normalizer

    def __call__(self, vector: Tensor) -> Tensor:
        sums = self._pass(vector)
        self.num_products += 1
        self.tell()
        loss = float(sums[0])
        # The loss comes with every product, so data that change are seen. In float32 the order of samples matters.
        error = max(1e-9, 1e3 * torch.finfo(self._curvature.dtype).eps)
        if abs(loss - self._loss) > error * max(abs(self._loss), abs(loss)):
            raise BatchError(
                f"The mean loss over all batches is {loss / self._normalizer:.9g} in one pass and {self.loss:.9g} in "
                "another, so there is no one Hessian: random augmentation, a loader with a generator of its own and "
                "drop_last, or noise in the forward. Give list(loader), and switch the noise off."
            )
        mean: Tensor = sums[3:] / self._normalizer
        return mean.to(vector)

    def _pass(self, vector: Tensor | None) -> Tensor:
        """``[loss, normalizer, samples, product...]``, summed over batches and ranks; an error is one on all ranks."""
        error: Exception | None = None
        found = LossSums()
        try:
            # The same shuffle in every pass.
            with random_states_kept(self._model), closing(batches_on(self._model, self._batches)) as batches:
                found = self._curvature.sums(map(split_batch, batches), vector)
        except Exception as caught:
            error = caught
        product = torch.zeros(0 if vector is None else self._curvature.size) if found.product is None else found.product
        failed = float(error is not None)
        numbers = torch.tensor([failed, found.loss, found.normalizer, found.num_samples], dtype=torch.float64)
        total = sum_over_ranks(torch.cat([numbers.to(self._curvature.device), product.to(self._curvature.device)]))
        if error is not None:
            raise error
        if float(total[0]):
            raise BatchError("Another rank has failed to measure its batches; its own error says why.")
        return total[1:]


def _trace(quadrature: Quadrature, probe: Tensor, found: Eigenpairs) -> float:
    """Hutchinson's estimate from one probe, with the part of known vectors exact instead of estimated.

    The vectors do not depend on the probe, so the mean is the trace however well they have converged.
    """
    size = len(probe)
    overlaps = (found.vectors @ (probe / math.sqrt(size))).double().cpu().square()
    return size * quadrature.rayleigh - float((found.values * (size * overlaps - 1)).sum())


def _certify_symmetric(quadrature: Quadrature, dtype: torch.dtype) -> None:
    """Every Hessian is symmetric; what autograd makes of wrong derivatives need not be."""
    if quadrature.asymmetry > 10 * math.sqrt(torch.finfo(dtype).eps):
        raise LayerSelectionError(
            f"Products with the Hessian are not symmetric (by {quadrature.asymmetry:.0e}, relative), so they are not "
            "the Hessian's: torch's parametrizations.weight_norm, an autograd.Function whose backward is not its "
            "derivative, or noise in the forward? Do without it, or choose params= behind it."
        )


def _deviation(numbers: Tensor) -> float:
    return float(numbers.std()) if len(numbers) > 1 else math.nan


def _teller(bar: Any, name: str, total: int) -> Callable[[], None]:
    task = bar.add_task(name, total=total)
    return lambda: bar.advance(task)
