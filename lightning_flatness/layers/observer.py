"""One batch in, block traces out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional.conditions import deferred_checks, holds
from lightning_flatness.functional.symmetric import Folded
from lightning_flatness.layers.certificates.layer import own_weight
from lightning_flatness.layers.certified import Certified, CertifiedPass
from lightning_flatness.layers.certify import certify_observed, naming
from lightning_flatness.layers.closed_form import closed_form_layer
from lightning_flatness.layers.estimates import BlockTraces, hutchinson_residual
from lightning_flatness.layers.gauss_newton import Advance, gauss_newton_layers
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.layers.sums import LayerStatistics, LayerSums, added
from lightning_flatness.layers.trial import Observable, try_observing
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import differentiable
from lightning_flatness.model.logits import logits_of
from lightning_flatness.results import LayerInfo, merged


class FlatnessObserver:
    """Measures batches of one model, whose weights must stay the same meanwhile.

    The first call finds the layers, and certifies on its batch how each can be measured: by the closed form, where it
    holds; else by the Gauss-Newton method, which is exact where the logits are affine in the layer's weight, and is
    labelled where they are not. :attr:`layers` then describes them. Every call leaves the model, its gradients, buffers
    and modes, the batch and all random states as they were.

    Beside that, it can observe forward passes that the user makes: :meth:`why_not_live`, :meth:`listen`,
    :meth:`observed`. The model, the options and the errors are those of :func:`~lightning_flatness.measure_flatness`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer = FlatnessObserver(net)
        >>> statistics = observer(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> statistics["0"].block_traces.shape, statistics["0"].num_samples
        (torch.Size([1, 4, 4]), 5)
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._options = Options(**options)
        self._model = model
        self._own = OwnPasses(model, self._options)
        # Known apart, so that passes of our own are certified on their own samples, not on the few of the trial.
        self._observable: Observable | None = None
        self._generator = torch.Generator().manual_seed(self._options.seed)
        self._defers_checks = True

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """How every layer is measured; empty before the first batch."""
        own, observed = self._own.known.infos, {} if self._observable is None else self._observable.known.infos
        return {name: merged([infos[name] for infos in (own, observed) if name in infos]) for name in own | observed}

    @property
    def left_out(self) -> dict[str, str]:
        """Layers of ``"all"`` that cannot be measured, and why."""
        return dict(self._own.known.left_out)

    def __call__(
        self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None
    ) -> dict[str, LayerStatistics]:
        """Statistics of one batch, by layer; ``advance`` is called with the part of it that is done.

        ``inputs`` are a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. ``targets``
        are as the loss takes them; without them, what needs them raises an error.
        """
        return _statistics(self.sums(inputs, targets, advance))

    def sums(self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None) -> dict[str, LayerSums]:
        """What a call returns, for adding up: symmetric matrices are folded."""
        totals: dict[str, LayerSums] = {}
        for part in self._own(inputs, targets, self._block_traces, advance):
            totals = added(totals, part)
        return totals

    def why_not_live(
        self, inputs: Any, targets: Tensor | None, forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> str:
        """Why the user's forward passes cannot be observed; empty if they can.

        That is tried out on the first samples of a batch: a pass of our own, observed in the way theirs would be and
        under the modes that are on now, must return bit-identical values, keep nothing, and give the same numbers.
        """
        batch = inputs, targets
        outcome = try_observing(self._model, self._options, batch, forward, self._block_traces, self._sums_observed)
        if isinstance(outcome, str):
            return outcome
        self._observable = outcome
        return ""

    def listen(self, inputs: Any) -> Listener:
        """Observe the user's forward pass on these inputs, once :meth:`why_not_live` has returned nothing."""
        assert self._observable is not None
        return Listener(self._model, inputs, self._observable.context.recorder, self._observable.same_calls)

    def observed(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerStatistics]:
        """Statistics of a batch on which the user's forward pass was observed.

        Raises:
            FlatnessError: it was not as in the passes of our own.
        """
        return _statistics(self.observed_sums(listener, targets))

    def observed_sums(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerSums]:
        """What :meth:`observed` returns, for adding up."""
        assert self._observable is not None
        sums, known = self._sums_observed(self._observable, listener, targets)
        self._observable = replace(self._observable, known=known)
        return sums

    def _sums_observed(
        self, observable: Observable, listener: Listener, targets: Tensor | None
    ) -> tuple[dict[str, LayerSums], Certified]:
        """Sums of an observed batch, and what is known after it.

        Checks of tensors are evaluated together at the end, so that a GPU is waited for once. If one fails, they are
        evaluated one by one, to tell which; so they are with the batches that follow.
        """
        with differentiable(self._model):
            if self._defers_checks:
                with deferred_checks() as all_hold:
                    try:
                        result = self._certified_sums(observable, listener, targets)
                    except (FlatnessError, RuntimeError):
                        if all_hold():
                            raise
                if all_hold():
                    return result
                self._defers_checks = False
            return self._certified_sums(observable, listener, targets)

    def _certified_sums(
        self, observable: Observable, listener: Listener, targets: Tensor | None
    ) -> tuple[dict[str, LayerSums], Certified]:
        recorded = listener.result()
        logits = recorded.logits.detach()
        if len(logits) < 2:
            raise BatchError("one sample is measured twice, side by side")
        loss = self._options.loss_function(logits, None if targets is None else targets.to(logits.device))
        certified, known = certify_observed(recorded, loss, observable.known, observable.context)
        return self._block_traces(certified, known), known

    def _block_traces(
        self, certified: CertifiedPass, known: Certified, advance: Advance = lambda part: None
    ) -> dict[str, LayerSums]:
        """Block traces of all layers, summed over the samples of a pass."""
        traces = {}
        for name in certified.tails:
            with naming(name):
                traces[name] = closed_form_layer(name, certified, known, self._options.diagonal)
        if certified.others:
            traces |= gauss_newton_layers(certified, known, self._options, self._generator, advance)
        for name, residual in self._residuals(certified, known).items():
            traces[name] = traces[name].plus(residual)
        return {name: _layer_sums(name, traces[name], certified, known) for name in certified.calls}

    def _residuals(self, certified: CertifiedPass, known: Certified) -> dict[str, BlockTraces]:
        """Estimates of what Gauss-Newton leaves out, of the layers that are measured so."""
        wanted = [name for name, info in known.infos.items() if info.method == "gauss_newton+hutchinson"]
        if not wanted:
            return {}
        calls = {name: certified.calls[name][0] for name in wanted}
        kernels = {name: call.convolution.weight.detach().clone().requires_grad_() for name, call in calls.items()}
        parameters = {own_weight(call.module): kernels[name] for name, call in calls.items()}
        grams = {name: known.layers[name].gram.whole() for name in wanted}
        if certified.loss.residual is None:
            raise BatchError("residual='hutchinson' depends on the targets, and this batch has none.")
        logits = logits_of(ModelCopy(self._model, self._options.measuring_dtype)(certified.recorded.inputs, parameters))
        scalar = (logits * certified.loss.residual.to(logits.dtype)).sum()
        return hutchinson_residual(scalar, kernels, grams, self._options, self._generator)


def _layer_sums(name: str, traces: BlockTraces, certified: CertifiedPass, known: Certified) -> LayerSums:
    if not holds(traces.total.sum().isfinite()):
        raise BatchError(f"The block traces of layer '{name}' are not finite: activations overflow in this batch.")
    folded, loss = Folded.of(traces.total), certified.loss  # symmetric but for rounding
    return LayerSums(folded, known.layers[name].gram, loss.num_samples, loss.normalizer, traces.variances)


def _statistics(sums: dict[str, LayerSums]) -> dict[str, LayerStatistics]:
    return {name: of_layer.statistics() for name, of_layer in sums.items()}
