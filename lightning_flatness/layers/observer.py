"""The observer, which computes block traces of batches of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError, naming
from lightning_flatness.functional import LossDerivatives
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.functional.conditions import deferred_checks
from lightning_flatness.functional.weighting import Weighting
from lightning_flatness.layers.certificates.layer import own_weight
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
from lightning_flatness.model.call import as_call
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import differentiable, without_wrapper
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.rows import SampleTensors, num_rows, take
from lightning_flatness.results import LayerInfo, merged

Result = TypeVar("Result")


class FlatnessObserver:
    """An observer that measures batches of one model, whose weights must not change between batches.

    The first call finds the layers, and certifies on its batch how each can be measured: by the closed form, if it
    holds, else by the Gauss-Newton method. Gauss-Newton is exact if the logits are affine in the layer's weight; if
    not, the layer is labelled inexact. :attr:`layers` then describes the layers. Every call leaves the model, its
    gradients, buffers and modes, the batch and all random states as they were.

    The normalised measure needs the spread of the layers' input channels before the first sample is measured:
    :meth:`channels` returns it for some samples, and :meth:`normalize` takes it for all that follows. Without it this
    measure is NaN.

    An observer can also observe forward passes that the user makes: :meth:`why_not_live`, :meth:`listen`,
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
        self._model = without_wrapper(model)
        self._own = OwnPasses(self._model, self._options)
        # Its certificates are separate: passes of our own must not rely on the few samples of the trial.
        self._observable: Observable | None = None
        self._generator = torch.Generator().manual_seed(self._options.seed)
        self._defers_checks = True
        self._deviations: Mapping[str, Tensor] = {}
        self._before: OwnPasses | None = None  # passes that show the channels
        self._weightings: dict[str, Weighting] = {}  # of the layers that were measured
        self._num_seen = 0

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """How each layer is measured; empty before the first batch."""
        own, observed = self._own.known.infos, {} if self._observable is None else self._observable.known.infos
        return {name: merged([infos[name] for infos in (own, observed) if name in infos]) for name in own | observed}

    @property
    def left_out(self) -> dict[str, str]:
        """The layers that ``layers="all"`` leaves out since they cannot be measured, and why."""
        observed = {} if self._observable is None else self._observable.known.left_out
        return dict(self._own.known.left_out or observed)

    def __call__(
        self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None
    ) -> dict[str, LayerStatistics]:
        """Return statistics of one batch, by layer; ``advance`` is called with the fraction of it that is done.

        ``inputs`` are a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. ``targets``
        have the form that the loss takes. Layers whose Hessian depends on them raise an error without them.
        """
        return self._statistics(self.sums(inputs, targets, advance))

    def channels(
        self, inputs: Any, targets: Tensor | None = None, samples: int | None = None
    ) -> dict[str, ChannelSums]:
        """Return the sums of every input channel of the layers, for the first samples of a batch, by layer.

        This makes a forward pass. With ``samples=None`` all samples of the batch are taken.
        """
        # Apart from what certifies: the first pass of that shows more than a later one would.
        self._before = self._before or OwnPasses(self._model, self._options)
        return self._before.channels(inputs, targets, samples)

    def normalize(self, deviations: Mapping[str, Tensor]) -> None:
        """Set the standard deviations ``(C,)`` of the input channels of every layer, by name."""
        self._deviations, self._before = deviations, None
        self._weightings.clear()

    def sums(self, inputs: Any, targets: Tensor | None = None, advance: Advance | None = None) -> dict[str, LayerSums]:
        """Return the results of a call in a form that can be added: symmetric matrices are kept as upper triangles."""
        totals: dict[str, LayerSums] = {}
        for part in self._own(inputs, targets, self._block_traces, advance):
            totals = added(totals, part)
        return totals

    def chosen(self, inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
        """Return the samples of a batch where the mask, ``(N,)``, is true; an error if they cannot be cut out."""
        return self._own.chosen(inputs, targets, mask)

    def why_not_live(self, inputs: Any, targets: Tensor | None) -> str:
        """Return why the user's forward passes cannot be observed, or an empty string if they can.

        A trial on the first samples of a batch decides. It observes a pass of our own as it would observe the user's,
        under the current modes and in the precision of ``inputs``, if they are a ``Call`` that was heard. The pass must
        return bit-identical outputs, keep no tensors of the graph, and give the same block traces, but for rounding in
        half precision.
        """
        batch = inputs, targets
        outcome = try_observing(self._model, self._options, batch, self._block_traces, self._sums_observed)
        if isinstance(outcome, str):
            return outcome
        self._observable = outcome
        return outcome.compiled

    def listen(self, inputs: Any = None) -> Listener:
        """Return a context that observes the call that the user makes of the model, by default whatever its inputs.

        :meth:`why_not_live` must come first.
        """
        assert self._observable is not None
        return Listener(self._model, self._observable.context.recorder, inputs, self._observable.precision)

    def observed(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerStatistics]:
        """Return statistics of a batch on which the user's forward pass was observed.

        Raises:
            FlatnessError: The pass differed from the passes of our own.
        """
        return self._statistics(self.observed_sums(listener, targets))

    def observed_sums(self, listener: Listener, targets: Tensor | None) -> dict[str, LayerSums]:
        """Return the results of :meth:`observed` in a form that can be added, like :meth:`sums`."""
        return self._observe(lambda observable: self._sums_observed(observable, listener, targets))

    def observed_forms(self, listener: Listener, targets: Tensor | None, is_pair: bool = False) -> ClosedForms:
        """Certify an observed pass, and return what :meth:`sums_of` computes its sums from later."""

        def forms(observable: Observable) -> tuple[ClosedForms, Certified]:
            return self._checked(lambda: self._forms(observable, listener, targets, is_pair))

        return self._observe(forms)

    def sums_of(self, forms: ClosedForms) -> dict[str, LayerSums]:
        """Return the sums of a pass that was observed before."""
        with differentiable(self._model):
            return self._measured(forms)

    def _observe(self, work: Callable[[Observable], tuple[Result, Certified]]) -> Result:
        assert self._observable is not None
        result, known = work(self._observable)
        self._observable = replace(self._observable, known=known)
        return result

    @property
    def observes_half(self) -> bool:
        """Whether the trial has shown that features are half precision."""
        return self._observable is not None and self._observable.half is not None

    @property
    def repeats(self) -> bool:
        """Whether passes of our own run as the user's do (see :meth:`repeated_forms`), also if these are not observed.

        They do in half precision, so that all samples are measured in one precision, and if the network is compiled.
        """
        return self.observes_half or (self._observable is not None and bool(self._observable.compiled))

    def repeated_forms(self, inputs: Any, targets: Tensor | None) -> ClosedForms:
        """Certify an observed pass of our own, which runs as the user's do; one sample runs as a pair."""
        assert self._observable is not None
        if as_call(inputs).precision != self._observable.precision:
            raise BatchError("validation runs in another precision than before (autocast)")
        samples = num_rows(inputs, targets)
        tensors = SampleTensors().narrowed(inputs, samples)
        if samples == 1 and not tensors.is_certified:
            raise BatchError("a single sample is measured as a pair, and its input has several tensors")
        rows = slice(0, samples)
        listener = repeated(self._model, tensors.take(inputs, rows), self._observable)
        try:
            pair = None if targets is None else take(targets, rows, samples)
            return self.observed_forms(listener, pair, is_pair=samples == 1)
        finally:
            listener.release()

    def _sums_observed(
        self, observable: Observable, listener: Listener, targets: Tensor | None
    ) -> tuple[dict[str, LayerSums], Certified]:
        """Return sums of an observed batch, and the updated certificates."""

        def sums() -> tuple[dict[str, LayerSums], Certified]:
            forms, known = self._forms(observable, listener, targets)
            return self._measured(forms), known

        return self._checked(sums)

    def _checked(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``, whose checks of tensors are evaluated together at the end.

        So the CPU waits for a GPU only once. If a check fails, the checks of this batch and of all later batches are
        evaluated one by one, to find out which one fails.
        """
        with differentiable(self._model):
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
        recorded = listener.result()
        if len(recorded.logits) < 2:
            raise BatchError("a batch of one sample cannot be observed, since a single sample is measured as a pair")

        def loss_at(logits: Tensor) -> LossDerivatives:
            loss = self._options.loss_function(logits, None if targets is None else targets.to(logits.device))
            return loss.halved() if is_pair else loss

        certified, known = certify_observed(recorded, loss_at, observable.known, observable.context)
        return ClosedForms.of(certified, known, outcomes_of_pass(certified)), known

    def _measured(self, forms: ClosedForms) -> dict[str, LayerSums]:
        sums = {}
        for name, form in forms.by_layer.items():
            with naming(name):
                traces = closed_form_layer(form, self._weighting(form.layer), self._options.diagonal)
            sums[name] = layer_sums(form.layer, traces, forms.loss, forms.outcomes)
        return sums

    def _weighting(self, layer: CertifiedLayer) -> Weighting:
        """Return the matrices that values of single samples of a layer are taken with, made once."""
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
        """Return block traces of all layers, summed over the samples of a pass."""
        forms = ClosedForms.of(certified, known, outcomes_of_pass(certified))
        sums = self._measured(forms)
        if not certified.others:
            return sums
        weightings = {name: self._weighting(known.layers[name]) for name in certified.others}
        traces = gauss_newton_layers(certified, known, weightings, self._options, self._generator, advance)
        for name, residual in self._residuals(certified, known, weightings).items():
            traces[name] = traces[name].plus(residual)
        sums |= {name: layer_sums(known.layers[name], traces[name], forms.loss, forms.outcomes) for name in traces}
        return {name: sums[name] for name in certified.calls}

    def _residuals(
        self, certified: CertifiedPass, known: Certified, weightings: Mapping[str, Weighting]
    ) -> dict[str, BlockTraces]:
        """Return estimates of the Hessian minus the Gauss-Newton matrix, for the layers measured with this residual."""
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
        return hutchinson_residual(scalar, kernels, grams, weightings, self._options, self._generator)

    def _statistics(self, sums: dict[str, LayerSums]) -> dict[str, LayerStatistics]:
        number = max((len(of_layer.samples) for of_layer in sums.values()), default=0)
        positions = self._num_seen + torch.arange(number, device="cpu")
        self._num_seen += number
        return {name: of_layer.statistics(of_layer.groups(positions)) for name, of_layer in sums.items()}
