"""Measure the largest eigenvalue of a layer's Hessian, and its relative variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.checks import check_positive, check_whole
from lightning_flatness.errors import BatchError, NotExactError
from lightning_flatness.functional import LargestEigenvalues, largest_eigenvalues
from lightning_flatness.layers.certified import Certified, CertifiedPass
from lightning_flatness.layers.operators import Operator, operators_of
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.measure.batches import NO_SAMPLE, paired_batches
from lightning_flatness.measure.ranks import gather, raise_on_all, sum_over_ranks
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.model.isolation import isolated, kept_switched, without_wrapper
from lightning_flatness.model.whole import whole_model
from lightning_flatness.results import LambdaMaxReport, LayerInfo, LayerLambdaMax, merged


def measure_lambda_max(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: str | Sequence[str] = "last",
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    by_filter: bool = True,
    tolerance: float = 1e-3,
    max_products: int = 100,
    max_gigabytes: float = 2.0,
    seed: int = 0,
    strict: bool = False,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    sync: bool = False,
) -> LambdaMaxReport:
    """Compute the largest eigenvalue of the Hessian of each layer's kernel, and its relative variants.

    The variants multiply eigenvalues by squared norms of weights. :class:`~lightning_flatness.LayerLambdaMax` has the
    formulas. The model runs once on every batch. Tensors that are needed for products with the Hessian stay in memory.
    Their size grows with the number of samples, so use some hundreds of samples.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: as for :func:`~lightning_flatness.measure_flatness`.
        layers: as for :func:`~lightning_flatness.measure_flatness`.
        loss: as for :func:`~lightning_flatness.measure_flatness`.
        label_smoothing: label smoothing of cross-entropy.
        class_weight: class weights of cross-entropy.
        ignore_index: target value that cross-entropy ignores.
        by_filter: also compute the largest eigenvalue of each filter's own block, for the neuron-wise variant.
        tolerance: stop the Lanczos iteration when the residuals are at most ``tolerance`` times the eigenvalues.
        max_products: largest number of products with the Hessian in a Lanczos iteration. Every layer takes one
            iteration, and with ``by_filter`` a second one.
        max_gigabytes: memory for the tensors that are kept; if more is needed, a :class:`BatchError` is raised.
        seed: seed of the starting vectors.
        strict: raise an error for a layer if its eigenvalues have not converged, or if only its Gauss-Newton matrix can
            be computed, and not its Hessian.
        dtype: precision in which the model runs, as for :func:`~lightning_flatness.measure_flatness`.
        sync: compute the Hessian over the batches of all ranks of a process group. Then call this function on every
            rank, with that rank's batches or with none. By default nothing communicates.

    Returns:
        A :class:`~lightning_flatness.LambdaMaxReport`: a mapping of layer names to
        :class:`~lightning_flatness.LayerLambdaMax`.

    Raises:
        FlatnessError: an option is invalid.
        LayerSelectionError: a layer or the forward pass cannot be measured, as in
            :func:`~lightning_flatness.measure_flatness`.
        NotExactError: with ``strict``, the Hessian of a layer cannot be computed, or eigenvalues have not converged.
        BatchError: logits, targets or weights cannot be measured, there are no batches, or more memory than
            ``max_gigabytes`` is needed.

    Source:
        Petzka et al. 2019 (arXiv 1912.00058) for the relative variants.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> largest = measure_lambda_max(net, [(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> largest["0"].exact, bool(largest["0"].residual_norm <= 1e-3 * largest["0"].lambda_max)
        (True, True)
    """
    options = Options(
        layers=layers,
        loss=loss,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        tolerance=0.0,
        seed=seed,
        strict=strict,
        dtype=dtype,
    )
    check_whole("max_products", max_products, least=1)
    check_positive("tolerance", tolerance)
    check_positive("max_gigabytes", max_gigabytes)
    model = without_wrapper(whole_model(model) if sync else model)
    passes = OwnPasses(model, options)
    operators: dict[str, list[Operator]] = {}
    kernels: dict[str, Tensor] = {}
    normalizer, num_samples, bytes_left = 0.0, 0, max_gigabytes * 1e9

    def keep(certified: CertifiedPass, known: Certified, advance: Callable[[float], None]) -> None:
        nonlocal normalizer, num_samples, bytes_left
        for name, operator in operators_of(certified, bytes_left, advance).items():
            operators.setdefault(name, []).append(operator)
            bytes_left -= operator.num_bytes
            kernels[name] = certified.calls[name][0].convolution.weight.detach()
        if bytes_left < 0:
            raise BatchError(
                f"measure_lambda_max needs more memory than max_gigabytes={max_gigabytes:g}. Give fewer samples or "
                "layers, or a larger max_gigabytes=."
            )
        normalizer += certified.loss.normalizer
        num_samples += certified.loss.num_samples

    error: Exception | None = None
    try:
        with kept_switched(model), paired_batches(model, batches) as pairs:
            for inputs, targets in pairs:
                list(passes(inputs, targets, keep))
    except Exception as caught:
        error = caught
    raise_on_all(error, sync)
    own = _Measured(
        passes.known.infos, {name: kernel.cpu() for name, kernel in kernels.items()}, normalizer, num_samples
    )
    total = _together(gather(own, sync), model)
    found = {}
    with isolated(model):
        for name, info in total.infos.items():
            kernel = total.kernels[name]
            hessian = _MeanHessian(name, kernel, operators.get(name, []), total.normalizer, sync)
            generator, limits = torch.Generator().manual_seed(seed), (tolerance, max_products)
            whole = hessian.largest(False, generator, *limits)
            blocks = hessian.largest(True, generator, *limits) if by_filter else None
            converged = all(one.converged(tolerance) for one in (whole, blocks) if one)
            if strict and not converged:
                raise NotExactError(
                    f"Layer '{name}': its largest eigenvalues have not converged after {max_products} products. "
                    "Increase max_products= or tolerance=, or leave strict= out."
                )
            square_norms, lambda_max = kernel.double().flatten(1).square().sum(1), float(whole.values)
            found[name] = LayerLambdaMax(
                lambda_max=lambda_max,
                residual_norm=float(whole.residuals),
                num_products=whole.num_products,
                layerwise_lambda_max=float(square_norms.sum()) * lambda_max,
                neuronwise_lambda_max=float((square_norms * blocks.values).sum()) if blocks else float("nan"),
                filter_lambda_max=blocks.values.cpu() if blocks else None,
                num_samples=total.num_samples,
                info=info,
                converged=converged,
            )
    return LambdaMaxReport(found, options.loss_function.label)


@dataclass(frozen=True)
class _Measured:
    """The measurements of one rank, or of all ranks together. The mappings have the names of the layers as keys."""

    infos: Mapping[str, LayerInfo]
    kernels: Mapping[str, Tensor]
    normalizer: float
    num_samples: int


def _together(ranks: Sequence[_Measured], model: nn.Module) -> _Measured:
    """Merge the measurements of all ranks, with the kernels on the model's device.

    Raise a :class:`BatchError` if no rank has samples, or if ranks measured different layers.
    """
    measured = [rank for rank in ranks if rank.num_samples]
    normalizer = sum(rank.normalizer for rank in ranks)
    if not normalizer > 0:
        raise BatchError(NO_SAMPLE)
    for rank in measured:
        different = sorted(rank.infos.keys() ^ measured[0].infos.keys())
        if different:
            raise BatchError(
                f"Layer '{different[0]}' is measured on some ranks and not on others. Name the layers with layers=."
            )
    device = measuring_device(next(model.parameters()).device)
    return _Measured(
        {name: merged([rank.infos[name] for rank in measured]) for name in measured[0].infos},
        {name: kernel.to(device) for name, kernel in measured[0].kernels.items()},
        normalizer,
        sum(rank.num_samples for rank in ranks),
    )


@dataclass(frozen=True)
class _MeanHessian:
    """The Hessian of the mean loss with respect to one layer's kernel, for products with vectors.

    The Hessian is the sum of ``operators`` divided by ``normalizer``. Batches are measured in parts, and there is one
    operator for each part of this rank's batches. With ``sync``, products are summed over ranks.
    """

    name: str
    kernel: Tensor
    operators: Sequence[Operator]
    normalizer: float
    sync: bool

    def largest(
        self, by_filter: bool, generator: torch.Generator, tolerance: float, max_products: int
    ) -> LargestEigenvalues:
        """Return the largest eigenvalue of the layer's Hessian.

        With ``by_filter``, return the largest eigenvalue of each filter's own block instead.
        """
        rows = len(self.kernel) if by_filter else 1
        shape = rows, self.kernel.numel() // rows
        start = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.kernel.device)

        def product(vectors: Tensor) -> Tensor:
            v = vectors.reshape(self.kernel.shape).to(self.kernel.dtype)
            total, error = torch.zeros_like(vectors), None
            try:
                for operator in self.operators:
                    total = total + operator(v, by_filter).double().reshape(vectors.shape) / self.normalizer
            except Exception as caught:
                error = caught
            return sum_over_ranks(total.flatten(), error, self.sync).reshape(vectors.shape)

        return largest_eigenvalues(product, start, tolerance, max_products)
