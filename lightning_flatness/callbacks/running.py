"""A measurement in progress, which observes the forward passes of validation if this does not change them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.data.sources import SeparateData, ValidationBatches
from lightning_flatness.errors import FlatnessError
from lightning_flatness.layers.live import KEEPS_TENSORS, Listener, same_inputs
from lightning_flatness.measure.batches import split_batch
from lightning_flatness.measure.flatness import Measurement
from lightning_flatness.model.rows import num_rows


class PassesOfRun:
    """A record of whether forward passes can be observed in a run. It informs the user whenever this changes."""

    def __init__(self, possible: bool) -> None:
        self.possible = possible
        self._told: str | None = None

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
    """A measurement in progress.

    It observes the forward passes of validation steps instead of making extra passes, if a trial on the first batch
    shows that observing changes nothing. If the trial fails, no passes are observed in the rest of the run. If the pass
    of a later batch cannot be used, no passes are observed in the rest of this measurement. ``observes`` tells whether
    to call :meth:`before_step`. ``step_context`` returns the context manager (autocast) in which the Trainer runs
    validation steps.
    """

    def __init__(
        self,
        measurement: Measurement,
        source: ValidationBatches | SeparateData,
        passes: PassesOfRun,
        step_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.measurement = measurement
        self._source = source
        self._passes = passes
        self._step_context = step_context
        self._is_tried = False
        self._listener: Listener | None = None
        self.observes = False
        if passes.possible and isinstance(source, ValidationBatches):
            if source.why_not_observed:
                passes.rule_out(source.why_not_observed)
            self.observes = passes.possible

    def before_step(self, batch: Any) -> None:
        """Start to observe the forward pass on a batch that is about to be validated."""
        self.release()
        inputs, targets = split_batch(batch)
        if num_rows(inputs, targets) < 2:  # a single sample needs an extra pass, which duplicates the sample
            return
        if not self._is_tried:
            self._is_tried = True
            reason = self.measurement.why_not_live(inputs, targets, self._step_context)
            if reason:
                self.observes = False
                self._passes.rule_out(reason)
                return
            self._passes.tell("")
        self._listener = self.measurement.listen(inputs)
        self._listener.__enter__()

    def after_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Measure the samples that the source yields after a batch was validated."""
        for inputs, targets in self._source.after_step(batch, batch_idx, dataloader_idx):
            if not self._add_observed(inputs, targets):
                self.measurement.update(inputs, targets)

    def measure_rest(self) -> None:
        """Measure the remaining samples when all batches have been validated."""
        for inputs, targets in self._source.rest():
            self.measurement.update(inputs, targets)

    def release(self) -> None:
        """Remove hooks from the network, and release the tensors of an observed pass."""
        if self._listener is not None:
            self._listener.__exit__()
            self._listener.release()
        self._listener = None

    def _add_observed(self, inputs: Any, targets: Tensor | None) -> bool:
        """Add the observed pass on a batch to the measurement. Return False if an extra pass must be made."""
        listener = self._listener
        if listener is None:
            return False
        listener.__exit__()
        reason, is_measured = listener.reason, False
        try:
            if not reason and same_inputs(inputs, listener.inputs):
                self.measurement.update_observed(listener, targets)
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
            self.observes = False
            self._passes.tell(reason)
        return is_measured
