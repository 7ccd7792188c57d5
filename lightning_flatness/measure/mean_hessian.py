"""The Hessian of the mean loss over all batches of all ranks, as a product with vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.measure.batches import paired_batches
from lightning_flatness.measure.ranks import sum_over_ranks
from lightning_flatness.model.hessian import LossCurvature


class MeanHessian:
    """Multiplies the Hessian (or Gauss-Newton matrix) of the mean loss with vectors ``(D,)``.

    Every product is a pass over all batches, with the same random numbers each time, and a collective. ``loss`` is the
    mean over samples, ``num_samples`` counts those of all ranks, ``num_products`` the products so far.
    """

    def __init__(self, model: nn.Module, curvature: LossCurvature, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            raise BatchError(
                f"The batches are a {type(batches).__name__}, which can be read only once, and every product with the "
                "Hessian reads them all. Give a DataLoader, or list(batches)."
            )
        self._model, self._curvature, self._batches = model, curvature, batches
        self.num_products = 0
        self._sum, self._normalizer, samples = self._pass(None).tolist()
        if not self._normalizer > 0:
            raise BatchError("No sample was measured, so there is no spectrum. Is the data set empty?")
        self.num_samples = round(samples)
        self.loss = self._sum / self._normalizer

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector, in its type."""
        sums = self._pass(vector)
        self.num_products += 1
        loss = float(sums[0])
        # The loss comes with every product and shows data that change. In float32 the order of samples matters.
        rounding = max(1e-9, 1e3 * torch.finfo(self._curvature.dtype).eps)
        if abs(loss - self._sum) > rounding * max(abs(self._sum), abs(loss)):
            raise BatchError(
                f"The mean loss over all batches is {loss / self._normalizer:.9g} in one pass and {self.loss:.9g} in "
                "another, so there is no one Hessian: random augmentation, a loader with a generator of its own and "
                "drop_last, or noise in the forward. Give list(loader), and switch the noise off."
            )
        mean: Tensor = sums[3:] / self._normalizer
        return mean.to(vector)

    def _pass(self, vector: Tensor | None) -> Tensor:
        """``[loss, normalizer, samples, product...]``, float64, summed over batches and ranks."""
        error: Exception | None = None
        size = 0 if vector is None else self._curvature.size
        sums = torch.zeros(3 + size, dtype=torch.float64, device=self._curvature.device)
        try:
            with paired_batches(self._model, self._batches) as pairs:
                own = self._curvature.sums(pairs, vector)
            sums[:3] = sums.new_tensor([own.loss, own.normalizer, own.num_samples])
            if own.product is not None:
                sums[3:] = own.product
        except Exception as caught:
            error = caught
        return sum_over_ranks(sums, error)
