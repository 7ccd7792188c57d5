"""Measure the flatness of layers batch by batch, and make the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import filter_flatness, filter_traces
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.functional.conditions import same_values
from lightning_flatness.layers.closed_form import ClosedForms
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.network import make_of
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.sums import LayerSums, added
from lightning_flatness.layers.waiting import WaitingSamples
from lightning_flatness.measure.batches import NO_SAMPLE
from lightning_flatness.measure.metric import FlatnessMetric
from lightning_flatness.measure.ranks import gather, num_ranks, own_rank
from lightning_flatness.measure.samples import FIRST_SAMPLES, Held, Samples, SampleValues, deviations_of, none_left
from lightning_flatness.model.call import as_call
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.model.isolation import untouched
from lightning_flatness.model.options import of_keywords
from lightning_flatness.model.precision import runs_in_half
from lightning_flatness.model.rows import num_rows
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerInfo, merged

# The number of samples on which layers are certified before a measurement.
MOST_CERTIFIED = 16


class Measurement:
    """One measurement in progress: an observer of the model, and the sums over samples for every layer.

    Normalised relative flatness needs the standard deviations of every layer's input channels. They are computed from
    the first samples of the measured set, over all ranks (:meth:`take_spread`). Until they are known, samples are
    "held": the measurement keeps them in memory, and measures them later (:meth:`measure_held`). With ``sync``, all
    ranks make one report together.

    ``observer`` is the :class:`FlatnessObserver` of the model. It tells whether the user's forward passes can be
    observed (``why_not_live``), and observes them (``listen``) for :meth:`update_observed`. If ``observer.repeats``,
    batches whose pass was not observed must be added by :meth:`update_repeated`.
    """

    def __init__(self, model: nn.Module, *, sync: bool = False, per_sample: bool = False, **options: Any) -> None:
        seed = options.get("seed", 0)
        self._options = of_keywords(Options, options)  # raises an error for invalid options
        # Every rank has its own seed: variances may be summed over ranks only if their probes are independent.
        self._new_observer = partial(FlatnessObserver, model, **options | {"seed": seed + 1000 * own_rank(sync)})
        self.observer = self._new_observer()
        self._sync = sync
        self._model = model
        self._sums: dict[str, LayerSums] = {}
        self._values = SampleValues(per_sample)
        self._held: list[Held] = []
        self._deviations: dict[str, Tensor] | None = None if self._options.is_normalized else {}
        self._num_seen = 0

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """Mapping from layer names to descriptions of how the layers are measured; empty before the first batch."""
        return self.observer.layers

    def update(
        self,
        inputs: Any,
        targets: Tensor | None = None,
        advance: Callable[[float], None] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Add one batch. A batch without samples adds nothing.

        ``advance`` is called with the fraction of the batch that is done. ``positions`` are the indices of the samples
        in the measured set, ``(N,)``. By default the ranks take turns: rank ``r`` of ``R`` has the samples ``r``,
        ``r + R``, ``r + 2R``, ...
        """
        samples = num_rows(inputs, targets)
        if self._deviations is not None or not samples:
            self._add(self.observer.sums(inputs, targets, advance), positions)
            return
        positions = self._positions(samples, positions)
        held, channels = self._hold_first(inputs, targets, positions, advance)
        if held < samples:
            rows = slice(held, samples)
            kept: tuple[Any, Tensor | None] = inputs, targets
            if not self._is_last(positions):  # the user's code may write to this batch before it is measured
                copied = inputs.clone() if isinstance(inputs, Tensor) else as_call(inputs).copied()
                kept = copied, None if targets is None else targets.clone()
            self._hold(channels, positions[rows], lambda: self.observer.sums(*kept, advance, rows))
        self.settle_when_due()

    def _hold_first(
        self, inputs: Any, targets: Tensor | None, positions: Tensor, advance: Callable[[float], None] | None
    ) -> tuple[int, Mapping[str, ChannelSums]]:
        """Run the first samples of a batch, and hold these samples if possible.

        ``positions`` are the indices of the batch's samples in the measured set. The first samples are all samples up
        to the last one with a position below ``FIRST_SAMPLES``.

        This method can hold the samples if every layer has a closed form, a formula that needs no second forward pass.
        Otherwise the caller holds the samples, and the model runs on them again later.

        Returns:
            ``(held, {})``, where ``held`` is the number of samples that this method holds. If some layer has no closed
            form, ``(0, sums)``, where ``sums`` maps layers to the :class:`ChannelSums` of the samples.
        """
        among_first = (positions < FIRST_SAMPLES).nonzero()
        if not len(among_first):
            return 0, {}
        waiting = self.observer.waiting(inputs, targets, slice(0, int(among_first.max()) + 1), advance)
        forms = [part.forms for part in waiting if part.forms is not None]
        if len(forms) < len(waiting):
            return 0, WaitingSamples.joined(waiting)
        held = 0
        for part, of_part in zip(waiting, forms, strict=True):
            end = held + of_part.num_samples
            self._hold(part.channels, positions[held:end], partial(self.observer.sums_of, of_part))
            held = end
        return held, {}

    def _unless_changed(self, measure: Callable[[], dict[str, LayerSums]]) -> Callable[[], dict[str, LayerSums]]:
        """Return a function that calls ``measure``, but raises an error if the weights have changed in the meantime."""
        before = self._weights()

        def measured() -> dict[str, LayerSums]:
            if not all(map(same_values, before, self._weights())):
                raise BatchError(
                    "The weights have changed before the first samples could be measured. With a validation loader "
                    "that has no length, weight averaging may swap the weights back too early. Give the loader a "
                    "length, or leave 'normalized_relative_flatness' out of measures=."
                )
            return measure()

        return measured

    def _weights(self) -> list[Tensor]:
        """Return copies of some entries of every parameter, but not of buffers, which a forward pass may change."""
        tensors = [parameter.detach().flatten() for parameter in self._model.parameters()]
        return [tensor[:: max(1, len(tensor) // 64)].clone() for tensor in tensors]

    @property
    def waits(self) -> bool:
        """Whether samples are held, because the standard deviations of the input channels are not known yet."""
        return self._deviations is None

    def settle_when_due(self) -> None:
        """Measure the held samples if the standard deviations of the input channels can now be computed.

        This is possible when this rank has seen all of its samples that are among the first ``FIRST_SAMPLES``. The
        method then calls :meth:`take_spread`, which is a collective with ``sync``.
        """
        if self._deviations is None and any(self._is_last(held.positions) for held in self._held):
            self.take_spread()
            self.measure_held()

    def _is_last(self, positions: Tensor) -> bool:
        """Return whether all samples of this rank's later batches come after the first ``FIRST_SAMPLES`` samples.

        ``positions`` are the indices of this batch's samples in the measured set of all ranks.
        """
        return none_left(positions, num_ranks(self._sync))

    def take_spread(self) -> None:
        """Compute the standard deviations of the input channels from the first samples of all ranks.

        If they are known already, do nothing. With ``sync`` this is a collective: call it on every rank, even on a rank
        that has no samples or has failed.
        """
        if self._deviations is None:
            self._deviations = deviations_of(self._held, self._sync)
            self.observer.normalize(self._deviations)

    def measure_held(self) -> None:
        """Measure the samples that are held. The standard deviations of the input channels must be known."""
        held, self._held = self._held, []
        for some in held:
            self._add(some.measure(), some.positions)

    def certify(self, inputs: Any, targets: Tensor | None, live: bool) -> None:
        """Certify the layers: check their numbers against autograd on a few samples of a batch, without adding them.

        ``live`` says that forward passes of the user's code shall be observed. If ``live`` and the model runs in half
        precision, also find out whether these passes can be observed.
        """
        try:
            self.observer.sums(inputs, targets, rows=slice(0, MOST_CERTIFIED))
        except Exception:
            # Some networks do not run on a part of a batch, e.g. if the inputs are a graph. Other errors come again.
            self.observer = self._new_observer()
            self.observer.sums(inputs, targets)
        if live and runs_in_half(self._model, as_call(inputs).precision):
            with untouched(self._model), torch.no_grad():  # training may have begun, and must not see this pass
                self.observer.why_not_live(inputs, targets)

    def update_observed(
        self, listener: Listener, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Add a batch whose forward pass the user ran and ``listener`` observed.

        If this raises an error, nothing is added. Call :meth:`settle_when_due` afterwards, because the samples are held
        if the standard deviations of the input channels are not known.
        """
        if self._deviations is not None:
            self._add(self.observer.observed_sums(listener, targets), positions)
            return
        self._hold_forms(self.observer.observed_forms(listener, targets), positions)

    def update_repeated(self, inputs: Any, targets: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Run the model on one batch in the same way as the user does, observe this forward pass, and add the batch.

        If this raises an error, nothing is added. Call :meth:`settle_when_due` afterwards, as for
        :meth:`update_observed`.
        """
        forms = self.observer.repeated_forms(inputs, targets)
        if self._deviations is None:
            self._hold_forms(forms, positions)
        else:
            self._add(self.observer.sums_of(forms), positions)

    def _hold(
        self, channels: Mapping[str, ChannelSums], positions: Tensor, measure: Callable[[], dict[str, LayerSums]]
    ) -> None:
        """Hold some samples. ``measure`` will be called when the standard deviations of the channels are known."""
        self._held.append(Held(channels, positions, self._unless_changed(measure)))

    def _hold_forms(self, forms: ClosedForms, positions: Tensor | None) -> None:
        """Hold the samples of an observed forward pass. They will be measured from the tensors in ``forms``."""
        positions = self._positions(forms.num_samples, positions)
        self._hold(forms.channels(), positions, partial(self.observer.sums_of, forms))

    def _positions(self, samples: int, positions: Tensor | None) -> Tensor:
        """Return the indices of this rank's next samples in the measured set, ``(samples,)``.

        These are the given ``positions`` if there is one for each sample. Otherwise the ranks take turns
        (:meth:`update`).
        """
        first, self._num_seen = self._num_seen, self._num_seen + samples
        if positions is not None and len(positions) == samples:
            return positions
        own = torch.arange(first, first + samples, device="cpu")
        return own * num_ranks(self._sync) + own_rank(self._sync)

    def _add(self, sums: dict[str, LayerSums], positions: Tensor | None) -> None:
        """Add the sums of every layer over one batch. Raise an error if the earlier batches had other layers."""
        different = sorted(sums.keys() ^ self._sums.keys())
        if sums and self._sums and different:
            raise BatchError(
                f"Layer '{different[0]}' is measured on some batches and not on others. Name the layers with layers=."
            )
        samples = max((len(of_layer.samples) for of_layer in sums.values()), default=0)
        if not samples:
            return
        if positions is None or len(positions) != samples:
            positions = self._positions(samples, None)
        self._values.add(sums, positions, {name for name, info in self.layers.items() if info.classifier is not None})
        self._sums = self._sums | added(self._sums, {name: sums[name].without_samples() for name in sums})

    def _metric(self, info: LayerInfo) -> FlatnessMetric:
        """Return a metric with the sums of one layer on this rank; the sums are zero if the rank has no samples."""
        # The metric is created at the end, so that only the sums take memory while the model runs. It is on the model's
        # device, because a backend such as NCCL works only with tensors on its own kind of device.
        tensor = next(iter(self._model.parameters()), None)
        device = torch.device("cpu") if tensor is None else measuring_device(tensor.device)
        with torch.device("cpu"):  # because the user may have set another default device
            metric = FlatnessMetric(info.num_filters, info.groups, self._options.diagonal)
        metric = metric.to(device)
        if info.name in self._sums:
            metric.update(*self._sums[info.name].statistics(self._values.groups[info.name]))
        return metric

    def report(self) -> FlatnessReport:
        """Return the flatness over all batches so far; with ``sync``, over the batches of all ranks.

        With ``sync``, call this on every rank, even on one without batches. If a layer's numbers are not exact on one
        rank, the reports of all ranks say so, with the reason. Raise a :class:`BatchError` if no rank has samples, or
        if ranks measured different layers.
        """
        self.take_spread()
        self.measure_held()
        ranks = gather((self.layers, self.observer.left_out), self._sync)
        found = [(layers, left_out) for layers, left_out in ranks if layers]
        if not found:
            raise BatchError(NO_SAMPLE)
        for layers, left_out in found:
            if layers.keys() != found[0][0].keys():
                different = sorted(layers.keys() ^ found[0][0].keys())
                reasons = {**left_out, **found[0][1]}
                raise BatchError(
                    f"Layer '{different[0]}' is measured on some ranks and not on others"
                    + (f" ({reasons[different[0]]})" if different[0] in reasons else "")
                    + ", since the ranks' first batches differ. Name the layers with layers=."
                )
        infos = {name: merged([layers[name] for layers, _ in found]) for name in found[0][0]}
        samples = self._values.gathered(self._sync)
        return FlatnessReport(
            {name: self._layer(info, samples) for name, info in infos.items()},
            {name: reason for _, left_out in reversed(found) for name, reason in left_out.items()},
            *samples.network(),
            loss_name=self._options.loss_function.label,
            sampling_errors=samples.network_errors(),
            num_groups=samples.num_groups,
            samples=samples.values_of_network(),
            **make_of(self._model),
        )

    def _layer(self, info: LayerInfo, samples: Samples) -> LayerFlatness:
        """Return the results of one layer; with ``sync`` this is a collective."""
        metric, deviations = self._metric(info), (self._deviations or {}).get(info.name)
        with metric.sync_context(should_sync=self._sync):
            means = metric.means()
            measures: dict[str, Any] = {key: float(value) for key, value in metric.measures().items()}
            block_traces, gram = (mean.cpu() for mean in means)
            standard_errors = metric.standard_errors()
            num_samples = int(metric.num_samples)
        return LayerFlatness(
            block_traces=block_traces,
            filter_traces=filter_traces(block_traces),
            filter_flatness=filter_flatness(block_traces, gram),
            num_samples=num_samples,
            info=info,
            standard_errors={key: error for key, error in standard_errors.items() if key in measures},
            num_dead_channels=int((deviations == 0).sum()) if deviations is not None else 0,
            sampling_errors={key: error for key, error in samples.layer_errors(info.name).items() if key in measures},
            largest_tenth=samples.largest_tenth(info.name),
            samples=samples.values_of_layer(info.name),
            **{"relative_flatness": math.nan, **measures},
        )
