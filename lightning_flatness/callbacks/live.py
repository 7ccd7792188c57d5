"""Observing the forward passes of validation steps in place of extra ones, where that changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.errors import FlatnessError
from lightning_flatness.layers.live import KEEPS_TENSORS, Listener, same_inputs
from lightning_flatness.measure.flatness import Measurement
from lightning_flatness.model.rows import num_rows


class PassesOfRun:
    """Whether forward passes can be observed in a run. Tells the user which passes are used, whenever that changes.

    Args:
        possible: False to observe none, and to tell nothing.
    """

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


class LiveForwards:
    """Observes the forward passes of validation steps for one measurement.

    The first batch is tried out in extra passes. If the trial fails, observing is ruled out for the run; if a later
    batch cannot be used, for this measurement.

    Args:
        run: the passes of this run.
        measurement: to which the batches are added.
        step_context: makes the context in which the Trainer runs validation steps (autocast).
    """

    def __init__(
        self, run: PassesOfRun, measurement: Measurement, step_context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._run = run
        self._measurement = measurement
        self._step_context = step_context
        self._usable: bool | None = None  # None before the trial
        self._listener: Listener | None = None

    def before_step(self, inputs: Any, targets: Tensor | None) -> None:
        """Listen for the forward pass on a batch that is about to be validated."""
        self.release()
        if num_rows(inputs, targets) < 2:  # a single sample is measured twice, in an extra pass
            return
        if self._usable is None:
            reason = self._measurement.why_not_live(inputs, targets, self._step_context)
            self._usable = not reason
            self._run.rule_out(reason) if reason else self._run.tell("")
        if self._usable:
            self._listener = self._measurement.listen(inputs)
            self._listener.__enter__()

    def after_step(self, inputs: Any, targets: Tensor | None) -> bool:
        """Add the observed pass on a batch to the measurement. Return False if an extra pass must do it."""
        listener = self._listener
        if listener is None:
            return False
        listener.__exit__()
        reason, is_measured = listener.reason, False
        try:
            if not reason and same_inputs(inputs, listener.inputs):
                self._measurement.update_observed(listener, targets)
                is_measured = True
        except (FlatnessError, RuntimeError) as error:
            # The extra pass reports the error, if there is one; or it succeeds because it takes less memory.
            reason = f"the forward pass of a batch could not be used ({error})"
        alive = listener.graph()
        del listener
        self.release()
        if alive() is not None:
            gc.collect()
        if not reason and alive() is not None:
            reason = KEEPS_TENSORS
        if reason:
            self._usable = False
            self._run.tell(reason)
        return is_measured

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of an observed pass."""
        if self._listener is not None:
            self._listener.__exit__()
            self._listener.release()
        self._listener = None


def new_live_forwards(
    run: PassesOfRun, trainer: Trainer, measurement: Measurement, data: Any, max_samples: int | None, batch_fn: Any
) -> LiveForwards | None:
    """Make what observes the validation steps for one measurement.

    Returns:
        None where nothing can be observed: it must be known before a step what of its batch is to be measured.
    """
    if not (isinstance(data, str) and data == "val") or not run.possible:
        return None
    if batch_fn is not None:
        run.rule_out("batch_fn= is called after the step")
    elif max_samples is not None:
        run.rule_out("max_samples= takes parts of batches")
    return LiveForwards(run, measurement, trainer.precision_plugin.val_step_context) if run.possible else None
