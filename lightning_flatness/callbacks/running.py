"""A measurement in progress, which observes the forward passes of validation steps where that changes nothing."""

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
    """Whether forward passes can be observed in a run. Tells the user which passes are used, whenever that changes."""

    def __init__(self, possible: bool) -> None:
        self.possible = possible
        self._told: str | None = None

    def rule_out(self, reason: str) -> None:
        """Observe no more passes in this run."""
        self.possible = False
        self.tell(reason)

    def tell(self, reason: str) -> None:
        """Tell why extra passes are made; an empty reason means that none are."""
        if reason != self._told:
            rank_zero_info(
                f"FlatnessCallback measures in forward passes of its own: {reason}."
                if reason
                else "FlatnessCallback observes the forward passes of validation and needs none of its own."
            )
        self._told = reason


class Running:
    """A measurement in progress.

    Forward passes of validation steps are observed in place of extra passes, if a trial on the first batch shows that
    this changes nothing. A failed trial rules observing out for the run; a batch that cannot be used, for this
    measurement. ``observes`` tells whether to call :meth:`before_step`; ``step_context`` makes the context in which the
    Trainer runs validation steps (autocast).
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
        """Listen for the forward pass on a batch that is about to be validated."""
        self.release()
        inputs, targets = split_batch(batch)
        if num_rows(inputs, targets) < 2:  # a single sample is measured twice, in an extra pass
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
        """Measure what is due after a batch was validated."""
        for inputs, targets in self._source.after_step(batch, batch_idx, dataloader_idx):
            if not self._add_observed(inputs, targets):
                self.measurement.update(inputs, targets)

    def measure_rest(self) -> None:
        """Measure what is left when all batches have been validated."""
        for inputs, targets in self._source.rest():
            self.measurement.update(inputs, targets)

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of an observed pass."""
        if self._listener is not None:
            self._listener.__exit__()
            self._listener.release()
        self._listener = None

    def _add_observed(self, inputs: Any, targets: Tensor | None) -> bool:
        """Add the observed pass on a batch. Return False if an extra pass must be made."""
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
            # The extra pass reports the error, if there is one; or it succeeds because it takes less memory.
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
