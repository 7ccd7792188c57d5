"""Measure during validation, and observe the forward passes of validation if observing does not change them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_flatness.callbacks.data.sources import Asked, SeparateData, ValidationBatches
from lightning_flatness.callbacks.network import Network
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.layers.live import KEEPS_TENSORS, OBSERVED_BY_ANOTHER, Listener, is_observed
from lightning_flatness.layers.trial import TRIAL
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.ranks import gather
from lightning_flatness.measure.samples import without_samples
from lightning_flatness.model.call import Call
from lightning_flatness.model.rows import num_rows, take
from lightning_flatness.results import FlatnessReport


class PassesOfRun:
    """A record of whether a run's forward passes can be observed. It tells the user whenever this changes.

    To observe a pass is to measure in a forward pass that validation makes anyway, instead of an extra pass.
    ``example`` is a few samples of an earlier call of the network, with their targets. Before passes are observed, a
    trial on these samples must show that observing changes nothing.
    """

    def __init__(self, possible: bool) -> None:
        self.possible = possible
        self.example: tuple[Call, Tensor | None] | None = None
        self._told: str | None = None

    def keep_example(self, call: Call, targets: Tensor | None) -> None:
        """Keep the first samples of a call as the example, unless there is one already or the call has one sample."""
        samples = num_rows(call, targets)
        if self.possible and self.example is None and samples > 1:
            rows = slice(0, TRIAL)
            kept = None if targets is None else torch.clone(take(targets, rows, samples))
            self.example = take(call, rows, samples).copied(), kept

    def rule_out(self, reason: str) -> None:
        """Stop observing passes for the rest of this run, and tell the user the reason."""
        self.possible = False
        self.tell(reason)

    def tell(self, reason: str) -> None:
        """Tell the user why extra passes are made. An empty reason means that no extra passes are made."""
        if reason != self._told:
            rank_zero_info(
                f"FlatnessCallback measures in forward passes of its own: {reason}."
                if reason
                else "FlatnessCallback observes the forward passes of validation and needs none of its own."
            )
        self._told = reason


class Running:
    """A measurement of one source of samples, in progress.

    It records the call of the network in each validation step. If a trial shows that observing changes nothing, it also
    observes the forward pass of that call, which saves an extra pass.

    If the trial fails, no pass is observed in the rest of the run. If the pass of a later batch cannot be used, no pass
    is observed in the rest of this measurement.
    """

    def __init__(
        self, measurement: Measurement, network: Network, source: ValidationBatches | SeparateData, passes: PassesOfRun
    ) -> None:
        self.measurement = measurement
        self.source = source
        self._network = network
        self._passes = passes
        self._is_tried = False
        self._repeats = True  # whether passes of our own run as the user's do and are observed, after the trial
        self._listener: Listener | None = None
        self._asked: Asked | None = None  # inputs and targets of the last batch
        self._observes = passes.possible and isinstance(source, ValidationBatches) and network.is_called
        if self._observes and isinstance(source, ValidationBatches) and source.why_not_observed:
            passes.rule_out(source.why_not_observed)
            self._observes = False

    def before_step(self, asked: Asked) -> None:
        """Start to record the network's call on a batch that is about to be validated."""
        self.release()
        if not self._network.is_called:
            return
        self._try_once()
        if self._observes and self._is_tried and is_observed(self._network.module):
            self._rule_out(OBSERVED_BY_ANOTHER)
        observes = self._observes and self._is_tried
        if observes:
            self._passes.tell("")
        inputs = asked.inputs if self._network.on_batch else None
        # The step calls the user's network. If this is sharded, the measured network is a copy with gathered weights.
        self._listener = self.measurement.listen(inputs) if observes else Listener(self._network.module, inputs=inputs)
        self._listener.__enter__()

    def _try_once(self) -> None:
        """Make the trial that shows whether passes can be observed, unless this measurement has made the trial."""
        example = self._passes.example
        if not self._observes or self._is_tried or example is None:
            return
        reason = self._try(*example)
        if reason and self.measurement.repeats:  # the network is compiled
            self._observes = False
            self._passes.tell(reason)
        elif reason:
            self._rule_out(reason)

    def _rule_out(self, reason: str) -> None:
        self._observes = False
        self._passes.rule_out(reason)

    def _try(self, call: Call, targets: Tensor | None) -> str:
        """Make the trial, and return why passes cannot be observed, or an empty string.

        If the network raises an error on the example, the trial says nothing yet: drop the example, so that a later
        batch gives another one.
        """
        try:
            reason = self.measurement.why_not_live(call, targets)
        except Exception:
            self._passes.example = None  # the next batch gives another example, or raises the same error
            return ""
        self._is_tried = True
        return reason

    def after_step(self, asked: Asked | None, call: Call | None, batch_idx: int) -> None:
        """After a validation step, measure the samples of its batch that the source chooses, or samples of other data.

        ``call`` is the network's call if a :class:`~lightning_flatness.callbacks.network.StepWatch` has watched this
        step. Otherwise the call that was recorded in this step is measured, or the batch's own inputs if the network is
        not seen to be called.
        """
        if isinstance(self.source, SeparateData):
            for inputs, targets in self.source.after_step():
                self.measurement.update(inputs, targets, positions=self.source.positions)
            return
        assert asked is not None
        self._asked = asked
        if call is None:
            call = self._recorded_call(asked, batch_idx) if self._network.is_called else asked.own_call()
        samples = asked.samples(call)
        if samples[0] is not call and self._observes:
            self._rule_out("batch_fn= gives other inputs than the validation step")
        self._passes.keep_example(*samples)
        mask = self.source.mask(samples, batch_idx)
        with asked.explaining():
            if not mask.all():
                if mask.any():
                    self._add_own(*self.measurement.chosen(*samples, mask))
            elif samples[0] is not call or not self._add_observed(samples[1]):
                self._add_own(*samples)
            self.measurement.settle_when_due()

    def _add_own(self, inputs: Any, targets: Tensor | None) -> None:
        """Measure samples in an extra forward pass.

        If a trial has shown that an extra pass can run in the same way and precision as the user's passes, the extra
        pass runs like that and is observed.
        """
        self._try_once()
        if self._repeats and ((self._observes and self._is_tried) or self.measurement.repeats):
            try:
                self.measurement.update_repeated(inputs, targets, self.source.positions)
                return
            except (RuntimeError, FlatnessError) as error:  # the errors that an observed pass may raise, too
                self._repeats = False
                if self._observes and self.measurement.observes_half:  # do not mix passes of two precisions
                    self._passes.tell(f"the forward pass of a batch could not be used ({error})")
                    self._observes = False
        self.measurement.update(inputs, targets, positions=self.source.positions)

    def measure_rest(self) -> None:
        """Measure the samples that remain in the source when all batches have been validated."""
        for inputs, targets in self.source.rest():
            self.measurement.update(inputs, targets, positions=self.source.positions)

    def measure_held(self) -> None:
        """Measure the samples that were held until all ranks knew the spread of the input channels."""
        with nullcontext() if self._asked is None else self._asked.explaining():
            self.measurement.measure_held()

    @property
    def has_targets(self) -> bool:
        """Whether the last batch had targets."""
        return self._asked is None or self._asked.targets is not None

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of an observed pass."""
        if self._listener is not None:
            self._listener.__exit__()
            self._listener.release()
        self._listener = None

    def _recorded_call(self, asked: Asked, batch_idx: int) -> Call:
        """Return the recorded call, if the step has called the network, and on one input only.

        Otherwise return the call on the inputs that ``batch_fn=`` gives, or raise an error if there is no
        ``batch_fn=``.
        """
        listener = self._listener
        assert listener is not None
        listener.__exit__()
        if listener.call is None or listener.num_others:
            if asked.is_given:
                self.release()
                return asked.own_call()
            problem = "does not call the network" if listener.call is None else "calls the network on different inputs"
            raise BatchError(
                f"The validation step {problem} on batch {batch_idx}, unlike before. Give batch_fn=, a function from a "
                "batch to (inputs, targets), for the inputs to measure."
            )
        return listener.call

    def _add_observed(self, targets: Tensor | None) -> bool:
        """Add the forward pass that was observed to the measurement. Return False if an extra pass must be made."""
        listener = self._listener
        if listener is None or not (self._observes and self._is_tried):
            return False
        if num_rows(listener.call, targets) < 2:  # a single sample needs an extra pass, on two copies of it
            self.release()
            return False
        reason, is_measured = listener.reason, False
        try:
            if not reason:
                self.measurement.update_observed(listener, targets, self.source.positions)
                is_measured = True
        except (FlatnessError, RuntimeError) as error:
            # An extra pass follows. It raises the same error, or succeeds because it needs less memory.
            reason = f"the forward pass of a batch could not be used ({error})"
        alive = listener.graph()
        self.release()
        if alive() is not None:
            gc.collect()
        if not reason and alive() is not None:
            reason = KEEPS_TENSORS
        if reason:
            self._observes = False
            self._passes.tell(reason)
        return is_measured


class Validation:
    """The measurement of one validation, with a :class:`Running` for every validation loader, or one for other data.

    The measurement of a loader begins with the first step on this loader, because no earlier step shows the network.

    Feature-normalised flatness needs the spread of the input channels, which the first samples of all ranks show. Until
    they have, samples are held. Finding the spread is a collective.
    """

    def __init__(
        self,
        sources: Sequence[ValidationBatches | SeparateData],
        passes: PassesOfRun,
        measurement_of: Callable[[Network], Measurement],
        waits: bool,
    ) -> None:
        self._waits = waits  # whether samples are held until all ranks know the spread of channels
        self._sources, self._passes, self._measurement_of = sources, passes, measurement_of
        self._running: dict[int, Running] = {}
        self._left_out: dict[int, str] = {}  # loaders that cannot be measured, and why

    def before_step(self, asked: Asked, network: Network, loader: int) -> None:
        """Start to record the network's call on a batch that is about to be validated."""
        self._of(loader, network).before_step(asked)

    def after_step(self, asked: Asked | None, call: Call | None, network: Network, batch_idx: int, loader: int) -> None:
        """Measure a validated batch, or the next part of other data.

        A loader other than the first is left out if its batches have no targets. After the last batch of a loader, the
        samples that were held are measured at once, because another callback may swap the weights before the epoch
        ends.
        """
        running = self._of(loader, network)
        if loader in self._left_out:
            return
        try:
            running.after_step(asked, call, batch_idx)
            if running.source.is_last(batch_idx):
                running.measurement.take_spread()
                running.measure_held()
        except BatchError as error:
            if loader == 0 or asked is None or asked.targets is not None:
                raise
            self._left_out[loader] = str(error)
        finally:
            running.release()

    def measure_rest(self, network: Network) -> None:
        """Measure the samples that remain in the sources when all batches have been validated."""
        for loader in range(len(self._sources)):
            self._of(loader, network).measure_rest()

    def settle(self, network: Network, failed: bool) -> None:
        """Measure the samples that are still held, unless this rank has failed. All ranks must call this method."""
        failures = [self._take_spread(loader, network) for loader in range(len(self._sources))]
        for failure in failures:
            if failure is not None:
                raise failure
        for loader in range(0 if failed else len(self._sources)):
            running = self._of(loader, network)
            try:
                if loader not in self._left_out:
                    running.measure_held()
            except BatchError as error:
                if loader == 0 or running.has_targets:
                    raise
                self._left_out[loader] = str(error)

    def _take_spread(self, loader: int, network: Network) -> Exception | None:
        """Find the spread of a loader's input channels, which is a collective.

        If this rank cannot measure the loader, the rank takes part in the collective without samples, and the method
        returns the error.
        """
        try:
            measurement = self._of(loader, network).measurement
        except Exception as error:
            if self._waits:
                without_samples(sync=True)
            return error
        measurement.take_spread()
        return None

    def reports(self, network: Network) -> dict[int, FlatnessReport]:
        """Return the report of every loader that was measured, by its index. All ranks must call this method."""
        several = len(self._sources) > 1
        left_out = (
            {loader: why for of_rank in gather(self._left_out, sync=True) for loader, why in of_rank.items()}
            if several
            else {}
        )
        for loader, reason in left_out.items():
            rank_zero_warn(f"FlatnessCallback leaves out validation loader {loader}: {reason}")
        measured = [loader for loader in range(len(self._sources)) if loader not in left_out]
        return {loader: self._of(loader, network).measurement.report() for loader in measured}

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of observed passes."""
        for running in self._running.values():
            running.release()

    def _of(self, loader: int, network: Network) -> Running:
        """Return the :class:`Running` of a loader, and begin its measurement at the first call."""
        loader = loader if len(self._sources) > 1 else 0
        if loader not in self._running:
            if loader > 0 and self._of(loader - 1, network).measurement.waits:
                # The collectives come in the order of the loaders, even on a rank that has no batch of one loader.
                self._of(loader - 1, network).measurement.take_spread()
            measurement = self._measurement_of(network)
            self._running[loader] = Running(measurement, network, self._sources[loader], self._passes)
        return self._running[loader]


def settle(running: Validation | None, network: Network, num_loaders: int, waits: bool, failed: bool) -> None:
    """Measure the samples that are still held, unless this rank has failed. All ranks must call this function.

    ``running`` is None on a rank that could not begin to measure. This rank takes part in the collectives without
    samples.
    """
    if running is not None:
        running.settle(network, failed)
    else:
        for _ in range(num_loaders if waits else 0):
            without_samples(sync=True)
