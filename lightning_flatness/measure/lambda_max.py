"""Measure the largest eigenvalue of a layer's Hessian, and its relative variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import LargestEigenvalues, largest_eigenvalues
from lightning_flatness.layers.certified import Certified, CertifiedPass
from lightning_flatness.layers.operators import Operator, operators_of
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.measure.batches import paired_batches
from lightning_flatness.model.isolation import isolated
from lightning_flatness.results import LayerLambdaMax


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
) -> dict[str, LayerLambdaMax]:
    """Compute the largest eigenvalue of the Hessian of each layer's kernel, and its variants relative to the weights.

    The model runs once on every batch. The tensors that products with the Hessian need are kept, so memory grows with
    the number of samples; some hundreds are advisable. In a process group, every rank measures only its own batches.

    The iteration stops when residuals are at most ``tolerance`` times the eigenvalues, or after ``max_products``
    products with the Hessian. If more than ``max_gigabytes`` would be kept, an error is raised. ``by_filter`` also
    computes the largest eigenvalue of each filter's own block, for the neuron-wise variant. ``seed`` determines the
    starting vectors. ``strict`` raises an error for layers of which only the Gauss-Newton matrix can be computed. The
    other arguments, and the errors, are those of :func:`~lightning_flatness.measure_flatness`.

    Returns:
        A :class:`~lightning_flatness.LayerLambdaMax` for every layer, by name.

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
    if not isinstance(max_products, int) or max_products < 1 or not tolerance > 0:
        raise FlatnessError(f"measure_lambda_max: {max_products=} must be at least one, and {tolerance=} positive.")
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
                f"measure_lambda_max keeps more than max_gigabytes={max_gigabytes:g}. Give fewer samples or layers, or "
                "a larger max_gigabytes=."
            )
        normalizer += certified.loss.normalizer
        num_samples += certified.loss.num_samples

    with paired_batches(model, batches) as pairs:
        for inputs, targets in pairs:
            list(passes(inputs, targets, keep))
    if not normalizer > 0:
        raise BatchError("No sample was measured, so there are no eigenvalues. Is the data set empty?")
    found = {}
    with isolated(model):
        for name, info in passes.known.infos.items():
            hessian = _MeanHessian(name, kernels[name], operators[name], normalizer)
            generator, limits = torch.Generator().manual_seed(seed), (tolerance, max_products)
            whole = hessian.largest(False, generator, *limits)
            blocks = hessian.largest(True, generator, *limits).values if by_filter else None
            square_norms, lambda_max = kernels[name].double().flatten(1).square().sum(1), float(whole.values)
            found[name] = LayerLambdaMax(
                lambda_max=lambda_max,
                residual_norm=float(whole.residuals),
                num_products=whole.num_products,
                layerwise_lambda_max=float(square_norms.sum()) * lambda_max,
                neuronwise_lambda_max=float("nan") if blocks is None else float((square_norms * blocks).sum()),
                filter_lambda_max=None if blocks is None else blocks.cpu(),
                num_samples=num_samples,
                info=info,
            )
    return found


@dataclass(frozen=True)
class _MeanHessian:
    """The mean over samples of a layer's Hessian, as the sum of the operators kept for each batch."""

    name: str
    kernel: Tensor
    operators: Sequence[Operator]
    normalizer: float

    def largest(
        self, by_filter: bool, generator: torch.Generator, tolerance: float, max_products: int
    ) -> LargestEigenvalues:
        """Return the largest eigenvalue of the Hessian, or with ``by_filter`` that of each filter's own block."""
        rows = len(self.kernel) if by_filter else 1
        shape = rows, self.kernel.numel() // rows
        start = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.kernel.device)

        def product(vectors: Tensor) -> Tensor:
            v = vectors.reshape(self.kernel.shape).to(self.kernel.dtype)
            total = torch.zeros_like(vectors)
            for operator in self.operators:
                total = total + operator(v, by_filter).double().reshape(vectors.shape) / self.normalizer
            if not bool(total.isfinite().all()):
                raise BatchError(
                    f"A product with the Hessian of layer '{self.name}' is not finite: activations overflow, or a "
                    "derivative is not finite (a square root or norm at zero? Add an epsilon there)."
                )
            return total

        return largest_eigenvalues(product, start, tolerance, max_products)
