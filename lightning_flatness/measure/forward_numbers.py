"""Compute numbers that need forward passes only: the mean loss, and two baselines for measures of flatness.

The baselines are the margin and the feature spread, which ``functional.baselines`` defines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional.baselines import feature_spreads, margins
from lightning_flatness.layers.selection import select
from lightning_flatness.measure.batches import NO_LOSS, paired_batches, with_targets
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import isolated, kept_switched, without_wrapper
from lightning_flatness.model.logits import finding_what_is_not_finite, logits_of
from lightning_flatness.model.options import MeasuringOptions


@dataclass(frozen=True)
class ForwardNumbers:
    """The mean loss, margin and feature spread over samples. A mean is NaN if it is not known."""

    loss: float
    margin: float = math.nan  # the target's logit minus the largest other logit; NaN unless targets are class indices
    feature_spread: float = math.nan  # see ``functional.baselines.feature_spreads``; NaN without a linear classifier


def forward_numbers(model: nn.Module, batches: Iterable[Any], options: MeasuringOptions) -> ForwardNumbers:
    """Compute mean loss, margin and feature spread over batches with targets, in evaluation mode.

    The model stays as it was. Raise a :class:`BatchError` if a batch has no targets, if there are no samples, or if
    all targets are ignored.
    """
    model = without_wrapper(model)
    classifier, sums = _Classifier(), torch.zeros(0, device="cpu")
    with kept_switched(model), paired_batches(model, batches) as pairs:
        for inputs, targets in with_targets(pairs):
            with isolated(model), finding_what_is_not_finite(model, inputs):
                copy = ModelCopy(model, options.measuring_dtype)
                if not len(sums):
                    classifier.find(model, copy, inputs)
                with classifier.heard(), torch.no_grad():
                    logits = logits_of(copy(inputs))
                    batch = _sums(options, logits, targets.to(logits.device), classifier)
            sums = batch + sums if len(sums) else batch
    if not len(sums) or not float(sums[0]) > 0:
        raise BatchError(NO_LOSS)
    weight, loss, count, margin, spread = sums.tolist()
    return ForwardNumbers(loss / weight, margin / count, spread / count)


class _Classifier:
    """Finds a network's linear classifier, and records its input and weight in forward passes."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._features: Tensor | None = None
        self._weight: Tensor | None = None

    def find(self, model: nn.Module, copy: ModelCopy, inputs: Any) -> None:
        """Run the model on ``inputs``, and find the classifier of the model in this forward pass."""
        with suppress(LayerSelectionError):  # the network has no linear classifier
            self._module = select(model, lambda: copy(inputs), "classifier").classifier

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Return a context manager inside which the latest call of the classifier is recorded.

        Nothing is recorded if the network has no linear classifier, or if the classifier is a TorchScript module.
        """
        if self._module is None or isinstance(self._module, torch.jit.ScriptModule):
            yield
            return
        handle = self._module.register_forward_pre_hook(self._hear, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _hear(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record the input and the weight of one call of the classifier. This is a forward pre-hook."""
        weight, features = getattr(module, "weight", None), next(iter((*arguments, *keywords.values())), None)
        if isinstance(features, Tensor) and isinstance(weight, Tensor):
            self._features, self._weight = features.detach(), weight.detach()

    def spreads(self, logits: Tensor) -> Tensor:
        """Return the feature spreads ``(N,)`` of the samples in the latest recorded call.

        All spreads are NaN if no call was recorded, or if the shapes of its input and weight do not fit the ``logits``.
        """
        if self._features is not None and self._weight is not None:
            features, weight = self._features.flatten(1), self._weight.flatten(1)
            if len(features) == len(logits) and weight.shape == (logits.shape[1], features.shape[1]):
                return feature_spreads(features, weight)
        return torch.full((len(logits),), torch.nan, dtype=torch.float64, device=logits.device)


def _sums(options: MeasuringOptions, logits: Tensor, targets: Tensor, classifier: _Classifier) -> Tensor:
    """Return five sums over the samples of a batch, on the CPU: weight, weighted loss, count, margin, feature spread.

    Samples with ignored targets are left out.
    """
    outcomes = options.loss_function(logits, targets).outcomes
    assert outcomes is not None  # there are targets
    weight, count, loss, correct = outcomes.unbind(1)
    counts = count > 0
    margin = torch.full_like(loss, torch.nan)
    if bool((counts & correct.isfinite()).any()):
        classes = targets.long().clamp(0, logits.shape[1] - 1)
        margin = torch.where(correct.isfinite(), margins(logits, classes), torch.nan)
    of_samples = torch.stack([weight, loss, count, margin, classifier.spreads(logits)], dim=1)
    return of_samples[counts].sum(0).cpu()
