"""Compute the block traces of a model's layers, batch by batch.

The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError, naming
from lightning_flatness.functional import LossDerivatives
from lightning_flatness.functional.conditions import deferred_checks
from lightning_flatness.functional.weighting import Weighting
from lightning_flatness.layers.certified import Certified, CertifiedLayer, CertifiedPass
from lightning_flatness.layers.certify import certify_observed
from lightning_flatness.layers.closed_form import ClosedForms, closed_form_layer
from lightning_flatness.layers.estimates import BlockTraces, hutchinson_residual
from lightning_flatness.layers.gauss_newton import Advance, gauss_newton_layers
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.layers.sums import LayerStatistics, LayerSums, added, layer_sums, outcomes_of_pass
from lightning_flatness.layers.trial import Observable, repeated, try_observing
from lightning_flatness.layers.waiting import WaitingSamples
from lightning_flatness.model.answer import certify_unchanged
from lightning_flatness.model.call import as_call
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import without_wrapper
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.options import of_keywords
from lightning_flatness.model.rows import SampleTensors, num_rows, take
from lightning_flatness.results import LayerInfo, merged

Result = TypeVar("Result")


class FlatnessObserver:
    """Computes the block traces of one model's layers, batch by batch; make a new one when the weights have changed.

    The first call selects the layers. It certifies whether the closed form, a formula for the whole Hessian, holds for
    each layer. Other layers are measured by the Gauss-Newton method. This method is exact if the logits are affine in
    the layer's weight; otherwise the layer is labelled inexact. After the first call, :attr:`layers` describes the
    layers. Every call leaves the model, its gradients, buffers and modes, the batch and all random states as they were.

    Normalised relative flatness is NaN without the standard deviations of the layers' input channels. Compute them from
    what :meth:`waiting` returns for some samples. Set them with :meth:`normalize` before the first sample is measured.

    An observer can also observe forward passes that the user makes. Call :meth:`why_not_live` first, then
    :meth:`listen`, then :meth:`observed`.

    Args:
        model: the model; see :func:`~lightning_flatness.measure_flatness`, also for the errors.
        options: the options of :func:`~lightning_flatness.measure_flatness` from ``layers`` to ``dtype``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer = FlatnessObserver(net)
        >>> statistics = observer(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> statistics["0"].block_traces.shape, statistics["0"].num_samples
        (torch.Size([1, 4, 4]), 5)
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._options = of_keywords(Options, options)
        self._model = without_wrapper(model)
        self._own = OwnPasses(self._model, self._options)
        # The certificates of the user's passes, made by `why_not_live`. They are separate from the certificates of
        # passes of our own, which must not rely on the few samples of the trial.
        self._observable: Observable | None = None
        self._generator = torch.Generator().manual_seed(self._options.seed)
        self._defers_checks = True
        self._deviations: Mapping[str, Tensor] = {}
        self._weightings: dict[str, Weighting] = {}  # keyed by layer name, made when first needed
        self._num_seen = 0
        self._weights: Mapping[torch.device, Tensor] | None = None  # a sample of the weights at the first batch

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """The description of how each layer is measured, keyed by layer name; empty before the first batch."""
        own, observed = self._own.known.infos, {} if self._observable is None else self._observable.known.infos
        return {name: merged([infos[name] for infos in (own, observed) if name in infos]) for name in own | observed}

    @property
    def left_out(self) -> dict[str, str]:
        """The layers that ``layers="all"`` has left out, each with the reason why it cannot be measured."""
        observed = {} if self._observable is None else self._observable.known.left_out
        return {**observed, **self._own.known.left_out}

    def __call__(
        self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None
    ) -> dict[str, LayerStatistics]:
        """Measure one batch, and return its statistics, keyed by layer name.

        Args:
            inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments of the model.
            targets: targets in the form that the loss expects. Without targets, a layer whose Hessian depends on them
                raises an error.
            advance: a function that is called with the fraction of the batch that is done.
        """
        self._weights = certify_unchanged(self._model, self._weights)
        return self._statistics(self.sums(inputs, targets, advance))

    def waiting(
        self, inputs: Any, targets: Tensor | None = None, rows: slice = slice(None), advance: Advance | None = None
    ) -> list[WaitingSamples]:
        """Run the samples ``rows`` of a batch in parts; return the data to measure each part later.

        A part has as many samples as fit in memory. It can be measured when the standard deviations of the input
        channels are known. Then pass :attr:`WaitingSamples.forms` to :meth:`sums_of`. If ``forms`` is None, call
        :meth:`sums`, which runs the samples once more.
        """
        return list(WaitingSamples.run(self._own, inputs, targets, rows, advance))

    def normalize(self, deviations: Mapping[str, Tensor]) -> None:
        """Set the standard deviations ``(C,)`` of each layer's input channels for all later batches."""
        self._deviations = deviations
        self._weightings.clear()

    def sums(
        self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None, rows: slice = slice(None)
    ) -> dict[str, LayerSums]:
        """Measure the samples ``rows`` of a batch, and return sums that can be added to those of other batches.

        In these sums, symmetric matrices are kept as upper triangles.
        """
        totals: dict[str, LayerSums] = {}
        for part in self._own(inputs, targets, self._block_traces, advance, rows):
            totals = added(totals, part)
        return totals

    def chosen(self, inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
        """Return the samples of a batch for which ``mask``, ``(N,)``, is True.

        Raises:
            BatchError: the logits of these samples change when the model runs without the rest of the batch.
        """
        return self._own.chosen(inputs, targets, mask)

    def why_not_live(self, inputs: Any, targets: Tensor | None) -> str:
        """Return why the user's forward passes cannot be observed, or an empty string if they can.

        A trial on the first samples of the batch decides (:func:`try_observing`). It observes a pass of our own that
        runs like the user's passes. This pass runs under the current modes and, if ``inputs`` are a recorded
        :class:`Call`, in the precision of that call. The outputs must be bit-identical to those of an unobserved pass.
        The block traces must be those of an unobserved pass, up to rounding. After the pass, the network must not keep
        tensors of the autograd graph alive.
        """
        batch = inputs, targets
        outcome = try_observing(self._model, self._options, batch, self._block_traces, self._sums_observed)
        if isinstance(outcome, str):
            return outcome
        self._observable = outcome
        return outcome.compiled

    def listen(self, inputs: Any = None, only: bool = True, compares_weights: bool = False) -> Listener:
        """Return a :class:`Listener` that observes one call of the model by the user's code.

        The arguments are those of :class:`Listener`, which says how they determine the observed call. Requires:
        :meth:`why_not_live` was called and found that passes can be observed.
        """
        assert self._observable is not None
        recorder, precision = self._observable.context.recorder, self._observable.precision
        return Listener(self._model, recorder, inputs, precision, only, compares_weights)

    def observed(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerStatistics]:
        """Return the statistics of a batch from the forward pass that ``listener`` observed, keyed by layer name.

        Raises:
            FlatnessError: no pass was observed, or a certificate fails.
        """
        return self._statistics(self.observed_sums(listener, targets))

    def observed_sums(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerSums]:
        """Return what :meth:`observed` computes, as sums that can be added to those of other batches."""
        return self._observe(lambda observable: self._sums_observed(observable, listener, targets))

    def observed_forms(self, listener: Listener, targets: Tensor | None, is_pair: bool = False) -> ClosedForms:
        """Certify an observed pass, and return the tensors from which :meth:`sums_of` later computes the sums.

        With ``is_pair``, the pass ran on a single sample that was duplicated.
        """

        def forms(observable: Observable) -> tuple[ClosedForms, Certified]:
            return self._checked(lambda: self._forms(observable, listener, targets, is_pair), observable.device)

        return self._observe(forms)

    def sums_of(self, forms: ClosedForms) -> dict[str, LayerSums]:
        """Return the :class:`LayerSums` of each layer by name; ``forms`` comes from a method of this class."""
        with self._options.derivatives(self._model, forms.outcomes.device):
            return self._measured(forms)

    def _observe(self, work: Callable[[Observable], tuple[Result, Certified]]) -> Result:
        """Call ``work``, which returns a result and certificates; store the certificates, and return the result."""
        assert self._observable is not None
        result, known = work(self._observable)
        self._observable = replace(self._observable, known=known)
        return result

    @property
    def observes_half(self) -> bool:
        """Whether the trial has found that layers, the classifier or the logits run in half precision."""
        return self._observable is not None and self._observable.half is not None

    @property
    def repeats(self) -> bool:
        """Whether passes of our own must run in the same way as the user's passes (see :meth:`repeated_forms`).

        This is True in half precision, because all samples must be measured in the same precision. It is also True if
        the network is compiled, because the user's passes of a compiled network cannot be observed.
        """
        return self.observes_half or (self._observable is not None and bool(self._observable.compiled))

    def repeated_forms(self, inputs: Any, targets: Tensor | None) -> ClosedForms:
        """Make a pass of our own in the same way as the user's passes, observe it, and certify it.

        A single sample is duplicated, so that it runs as a pair. The result is as in :meth:`observed_forms`.
        """
        assert self._observable is not None
        if as_call(inputs).precision != self._observable.precision:
            raise BatchError("validation runs in another precision than before (autocast)")
        samples = num_rows(inputs, targets)
        tensors = SampleTensors().narrowed(inputs, samples)
        if samples == 1 and not tensors.is_certified:
            raise BatchError("it is not known which of several input tensors to duplicate for a single sample")
        rows = slice(0, samples)
        listener = repeated(self._model, tensors.take(inputs, rows), self._observable)
        answer = as_call(inputs).answer
        try:
            if answer is not None:
                answer.certify_logits(listener.result().logits[:samples], 0)
            pair = None if targets is None else take(targets, rows, samples)
            return self.observed_forms(listener, pair, is_pair=samples == 1)
        finally:
            listener.release()

    def _sums_observed(
        self, observable: Observable, listener: Listener, targets: Tensor | None
    ) -> tuple[dict[str, LayerSums], Certified]:
        """Return the sums of an observed batch, keyed by layer name, and the certificates updated by this batch."""

        def sums() -> tuple[dict[str, LayerSums], Certified]:
            forms, known = self._forms(observable, listener, targets)
            return self._measured(forms), known

        return self._checked(sums, observable.device)

    def _checked(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Call ``work``, evaluate all its checks of tensors together at the end, and return its result.

        With checks at the end, the CPU waits for a GPU only once. If a check fails, ``work`` is called again and
        evaluates every check immediately, to find the one that fails. From then on, all batches evaluate checks
        immediately.
        """
        with self._options.derivatives(self._model, device):
            if self._defers_checks:
                with deferred_checks() as all_hold:
                    try:
                        result = work()
                    except (FlatnessError, RuntimeError):
                        if all_hold():
                            raise
                if all_hold():
                    return result
                self._defers_checks = False
            return work()

    def _forms(
        self, observable: Observable, listener: Listener, targets: Tensor | None, is_pair: bool = False
    ) -> tuple[ClosedForms, Certified]:
        """Certify an observed pass; return the tensors that the closed form needs, and the updated certificates."""
        recorded = listener.result()
        if len(recorded.logits) < 2:
            raise BatchError("the batch has a single sample, which must be duplicated before the pass")

        def loss_at(logits: Tensor) -> LossDerivatives:
            loss = self._options.loss_function(logits, None if targets is None else targets.to(logits.device))
            return loss.halved() if is_pair else loss

        certified, known = certify_observed(recorded, loss_at, observable.known, observable.context)
        return ClosedForms.of(certified, known, outcomes_of_pass(certified)), known

    def _measured(self, forms: ClosedForms) -> dict[str, LayerSums]:
        """Return the sums of each layer that is measured without backward passes."""
        sums = {}
        for name, form in forms.by_layer.items():
            with naming(name):
                traces = closed_form_layer(form, self._weighting(form.layer), self._options.diagonal)
            sums[name] = layer_sums(form.layer, traces, forms.loss, forms.outcomes)
        return sums

    def _weighting(self, layer: CertifiedLayer) -> Weighting:
        """Return the matrices that a layer's measures need; they are cached until :meth:`normalize` is called."""
        info, options = layer.info, self._options
        if info.name not in self._weightings:
            kernel, deviations = layer.kernel.value.weight, self._deviations.get(info.name)
            gram = None if options.diagonal else layer.gram.whole()
            weighting = Weighting.of(kernel, info.groups, gram, deviations, options.by_channel)
            self._weightings[info.name] = weighting
        return self._weightings[info.name]

    def _block_traces(
        self, certified: CertifiedPass, known: Certified, advance: Advance = lambda part: None
    ) -> dict[str, LayerSums]:
        """Return the sums of each layer over the samples of a certified pass."""
        forms = ClosedForms.of(certified, known, outcomes_of_pass(certified))
        sums = self._measured(forms)
        if certified.need_backward:
            weightings = {name: self._weighting(known.layers[name]) for name in certified.need_backward}
            traces = gauss_newton_layers(certified, known, weightings, self._options, self._generator, advance)
            for name, residual in self._residuals(certified, known, weightings).items():
                traces[name] = traces[name].plus(residual)
            sums |= {name: layer_sums(known.layers[name], traces[name], forms.loss, forms.outcomes) for name in traces}
        return {name: sums[name] for name in certified.calls}

    def _residuals(
        self, certified: CertifiedPass, known: Certified, weightings: Mapping[str, Weighting]
    ) -> dict[str, BlockTraces]:
        """Estimate the block traces of each layer's Hessian minus its Gauss-Newton matrix.

        Only layers that are measured with ``residual="hutchinson"`` are in the result.
        """
        wanted = [name for name, info in known.infos.items() if info.method == "gauss_newton+hutchinson"]
        if not wanted:
            return {}
        weights = {name: certified.calls[name][0].convolution.weight for name in wanted}
        kernels = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        replacements = {self._own.context.selection.parameters[name]: kernel for name, kernel in kernels.items()}
        grams = {name: known.layers[name].gram.whole() for name in wanted}
        if certified.loss.residual is None:
            raise BatchError("residual='hutchinson' needs targets, but this batch has none. Give (inputs, targets).")
        copy = ModelCopy(self._model, self._options.measuring_dtype)
        logits = logits_of(copy(certified.recorded.inputs, replacements))
        scalar = (logits * certified.loss.residual.to(logits.dtype)).sum()
        return hutchinson_residual(scalar, kernels, grams, weightings, self._options, self._generator)

    def _statistics(self, sums: dict[str, LayerSums]) -> dict[str, LayerStatistics]:
        """Convert sums to statistics, which have sums over groups of samples in place of values of single samples.

        The group of a sample depends on how many samples were measured before this sample.
        """
        number = max((len(of_layer.samples) for of_layer in sums.values()), default=0)
        positions = self._num_seen + torch.arange(number, device="cpu")
        self._num_seen += number
        return {name: of_layer.statistics(of_layer.groups(positions)) for name, of_layer in sums.items()}
