"""Multiply vectors by the Hessian of the mean loss over all batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.measure.batches import check_rereadable, paired_batches
from lightning_flatness.measure.ranks import sum_over_ranks
from lightning_flatness.model.hessian import LossCurvature


class MeanHessian:
    """The Hessian (or Gauss-Newton matrix) of the mean loss, as a function that multiplies it by a vector ``(D,)``.

    Every product reads all batches, with the same random numbers. With ``sync``, the loss is the mean over the batches
    of all ranks, and a product is a collective: call it on every rank. ``loss`` is the mean loss over the
    ``num_samples`` samples, and ``num_products`` is the number of products so far.
    """

    def __init__(self, model: nn.Module, curvature: LossCurvature, batches: Iterable[Any], sync: bool) -> None:
        check_rereadable(batches, "every product with the Hessian reads all batches")
        self._model, self._curvature, self._batches, self._sync = model, curvature, batches, sync
        self.num_products = 0
        self._sum, self._normalizer, samples = self._pass(None).tolist()
        if not self._normalizer > 0:
            raise BatchError(
                "No sample was measured, so there is no spectrum. Is the data set empty, or are all targets ignored?"
            )
        self.num_samples = round(samples)
        self.loss = self._sum / self._normalizer

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product of the Hessian with a vector, in the vector's dtype.

        Raise a :class:`BatchError` if the mean loss is not the same as in the first pass.
        """
        sums = self._pass(vector)
        self.num_products += 1
        loss = float(sums[0])
        # A loss that differs between passes shows that the data have changed. A loader that shuffles may change the
        # order of the samples, and with it the rounding.
        rounding = max(1e-9, 1e3 * torch.finfo(self._curvature.dtype).eps)
        if abs(loss - self._sum) > rounding * max(abs(self._sum), abs(loss)):
            raise BatchError(
                f"The mean loss over all batches is {loss / self._normalizer:.9g} in one pass and {self.loss:.9g} in "
                "another, so the Hessian is not unique. If the loader augments at random or leaves out different "
                "samples in every pass, give list(loader). If the forward pass has noise, switch it off."
            )
        mean: Tensor = sums[3:] / self._normalizer
        return mean.to(vector)

    def _pass(self, vector: Tensor | None) -> Tensor:
        """Return the sums ``[loss, normalizer, samples, product...]`` over all batches, float64 ``(3 + D,)``.

        With ``sync``, the sums are over the batches of all ranks. If ``vector`` is None, the sums are ``(3,)``, without
        a product. Otherwise the normalizer and the number of samples are zero, because they are known already.
        """
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
        return sum_over_ranks(sums, error, self._sync)
