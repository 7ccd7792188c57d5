"""Measure the samples of one source: the validated batches of a loader, or other data.

Observe the forward passes of validation if this does not change them. To observe a pass means to measure in a forward
pass that validation makes anyway, instead of an extra pass.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_flatness.callbacks.data.sources import Asked, SeparateData, ValidationBatches
from lightning_flatness.callbacks.network import Network
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.layers.certificates.layer import OtherKernelError
from lightning_flatness.layers.live import KEEPS_TENSORS, OBSERVED_BY_ANOTHER, Listener, is_observed
from lightning_flatness.layers.trial import TRIAL
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.model.answer import OTHER_WEIGHTS, certify_weights
from lightning_flatness.model.call import Call
from lightning_flatness.model.rows import num_rows, take


class PassesOfRun:
    """Records whether the forward passes of a run can be observed, and tells the user whenever this changes.

    Before passes are observed, a trial must show that observing changes nothing. The trial runs the network on
    ``example``, which is a few samples of an earlier call of the network, with their targets.
    """

    def __init__(self, possible: bool) -> None:
        self.possible = possible
        self.example: tuple[Call, Tensor | None] | None = None
        self._told: str | None = None
        self._told_of_targets = False

    def tell_of_targets(self, reason: str) -> None:
        """Warn once in a run that the batches have no targets, for a given reason, so that the loss is not known."""
        if not self._told_of_targets:
            rank_zero_warn(
                f"FlatnessCallback finds no targets in a batch, so the loss and 'top1' are not logged. {reason} "
                "batch_fn=lambda batch: (None, targets) gives the targets alone."
            )
        self._told_of_targets = True

    def keep_example(self, call: Call, targets: Tensor | None) -> None:
        """Store the first samples of a call as the example, if there is none yet and the call has several samples."""
        samples = num_rows(call, targets)
        if self.possible and self.example is None and samples > 1:
            call = call._replace(answer=None)  # of these weights, which will have changed
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
                f"FlatnessCallback measures in forward passes of its own: {reason.removesuffix('.')}."
                if reason
                else "FlatnessCallback observes the forward passes of validation and needs none of its own."
            )
        self._told = reason


class NotCalledError(BatchError):
    """A validation step does not call the network that earlier steps have called."""


class Running:
    """A running measurement of one source of samples.

    It records the call of the network in each validation step. If a trial shows that observing changes nothing, it also
    observes the forward pass of that call, which saves an extra pass.

    If the trial fails, it observes no more passes in this run. If the network is compiled, or if the pass of a later
    batch cannot be used, it observes no more passes in this measurement.
    """

    def __init__(
        self, measurement: Measurement, network: Network, source: ValidationBatches | SeparateData, passes: PassesOfRun
    ) -> None:
        self.measurement = measurement
        self.source = source
        self.network = network
        self._passes = passes
        self._is_tried = False
        self._repeats = True  # False after an extra pass that ran like those of validation has raised an error
        self._listener: Listener | None = None
        self._asked: Asked | None = None  # inputs and targets of the latest batch
        self._observes = passes.possible and isinstance(source, ValidationBatches) and network.is_called
        if self._observes and isinstance(source, ValidationBatches) and source.why_not_observed:
            passes.rule_out(source.why_not_observed)
            self._observes = False

    def before_step(self, asked: Asked) -> None:
        """Start to record the network's call on a batch that is about to be validated."""
        self.release()
        if not self.network.is_called:
            return
        self._try_once()
        if self._observes and self._is_tried and is_observed(self.network.module):
            self._rule_out(OBSERVED_BY_ANOTHER)
        observes = self._observes and self._is_tried
        if observes:
            self._passes.tell("")
        only, is_first = self.network.on_batch, self._asked is None
        # Listen to the user's network, which the step calls, even if a copy of it with gathered weights is measured.
        self._listener = (
            self.measurement.observer.listen(asked.inputs, only=only, compares_weights=is_first)
            if observes
            else Listener(self.network.module, inputs=asked.inputs, only=only, compares_weights=is_first)
        )
        self._listener.__enter__()

    def _try_once(self) -> None:
        """Make the trial that shows whether passes can be observed, unless this measurement has made it already."""
        example = self._passes.example
        if not self._observes or self._is_tried or example is None:
            return
        reason = self._try(*example)
        if reason and self.measurement.observer.repeats:  # the network is compiled
            self._observes = False
            self._passes.tell(reason)
        elif reason:
            self._rule_out(reason)

    def _rule_out(self, reason: str) -> None:
        self._observes = False
        self._passes.rule_out(reason)

    def _try(self, call: Call, targets: Tensor | None) -> str:
        """Make the trial. Return the reason why passes cannot be observed, or an empty string.

        If the network raises an error on the example, drop the example, and return an empty string. A later batch then
        gives another example for another trial.
        """
        try:
            reason = self.measurement.observer.why_not_live(call, targets)
        except Exception:
            self._passes.example = None  # the next batch gives another example, or raises the same error
            return ""
        self._is_tried = True
        return reason

    def after_step(self, asked: Asked | None, call: Call | None, batch_idx: int) -> None:
        """Measure the samples that are due after a validation step.

        They are the samples of the batch that the source selects, or the next part of :class:`SeparateData`.

        ``call`` is the call of the network that a :class:`~lightning_flatness.callbacks.step_watch.StepWatch` has found
        in this step. If ``call`` is None, measure the call that this object has recorded in this step, or the inputs in
        the batch if ``Network.is_called`` is False. If ``batch_fn=`` gives inputs that differ from those of the call,
        measure the inputs from ``batch_fn=``. If the batch is empty and the step skips it, measure nothing.

        Raises:
            BatchError: The step calls the network several times on different inputs, unlike earlier steps, and
                ``batch_fn=`` gives no inputs. Or the network has other weights now than it had in the step. Or it is
                not certain which targets belong to which samples.
            NotCalledError: The step does not call the network, unlike earlier steps.
        """
        if isinstance(self.source, SeparateData):
            for inputs, targets in self.source.after_step():
                self.measurement.update(inputs, targets, positions=self.source.positions)
            return
        assert asked is not None
        self._asked = asked
        if call is None and asked.is_empty and (self._listener is None or self._listener.call is None):
            return
        if call is None:
            call = self._recorded_call(asked, batch_idx) if self.network.is_called else asked.own_call()
        is_own = self._listener is not None and self._listener.is_on_inputs
        samples = asked.samples(call, is_own)
        if samples[0] is not call and self._observes:
            self._rule_out("batch_fn= gives other inputs than the validation step")
        self._passes.keep_example(*samples)
        if samples[1] is None and asked.why_no_targets:
            self._passes.tell_of_targets(asked.why_no_targets)
        mask = self.source.mask(samples, batch_idx)
        with asked.explaining():
            if not mask.all():
                if mask.any():
                    self._add_own(*self.measurement.observer.chosen(*samples, mask))
            elif samples[0] is not call or not self._add_observed(call, samples[1]):
                self._add_own(*samples)
            self.measurement.settle_when_due()

    def _add_own(self, inputs: Any, targets: Tensor | None) -> None:
        """Measure samples in an extra forward pass.

        If a trial has shown that extra passes can run in the same way and precision as those of validation, run this
        pass so, and observe it. If this raises an error, run this and all later extra passes as usual.
        """
        self._try_once()
        if self._repeats and ((self._observes and self._is_tried) or self.measurement.observer.repeats):
            try:
                self.measurement.update_repeated(inputs, targets, self.source.positions)
                return
            except (RuntimeError, FlatnessError) as error:  # the same errors as in _add_observed
                self._repeats = False
                if self._observes and self.measurement.observer.observes_half:  # do not mix passes of two precisions
                    self._passes.tell(f"the forward pass of a batch could not be used ({error})")
                    self._observes = False
        self.measurement.update(inputs, targets, positions=self.source.positions)

    def measure_rest(self) -> None:
        """Measure the samples that remain in the source when all batches have been validated."""
        for inputs, targets in self.source.rest():
            self.measurement.update(inputs, targets, positions=self.source.positions)

    def measure_held(self) -> None:
        """Measure the samples that have waited for the standard deviations of the layers' input channels."""
        with nullcontext() if self._asked is None else self._asked.explaining():
            self.measurement.measure_held()

    @property
    def has_targets(self) -> bool:
        """Whether the latest batch had targets. True if there was no batch."""
        return self._asked is None or self._asked.targets is not None

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of an observed pass."""
        if self._listener is not None:
            self._listener.__exit__()
            self._listener.release()
        self._listener = None

    def _recorded_call(self, asked: Asked, batch_idx: int) -> Call:
        """Return the recorded call if the step called the network on one input only.

        Otherwise return a call on the inputs of ``batch_fn=``, or raise an error if ``batch_fn=`` gives no inputs. If
        the step does not call the network at all, it may call another one now. So this is an error even with such
        inputs, unless ``model=`` names the network.
        """
        listener = self._listener
        assert listener is not None
        listener.__exit__()
        call = listener.call
        if call is not None and not listener.num_others:
            certify_weights(call)
            return call
        if asked.is_given and (call is not None or self.network.is_named):
            self.release()
            return asked.own_call()
        if call is not None:
            raise BatchError(
                f"The validation step makes several different calls of the network in batch {batch_idx}, unlike in "
                "earlier batches. Give batch_fn=, a function from a batch to the (inputs, targets) to measure."
            )
        raise NotCalledError(
            f"The validation step does not call the network in batch {batch_idx}, unlike in earlier batches. It may "
            "call another module now. Name the network to measure with model=, and give batch_fn=, a function from a "
            "batch to the (inputs, targets) to measure. It must return (None, None) if the step skips the batch."
        )

    def _add_observed(self, call: Call, targets: Tensor | None) -> bool:
        """Add the observed forward pass to the measurement. Return False if an extra pass must be made."""
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
        except OtherKernelError as error:
            # This raises another error if the layer computes its kernel from its input.
            self._add_own(call._replace(answer=None), targets)
            raise BatchError(OTHER_WEIGHTS) from error
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
