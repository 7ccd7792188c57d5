"""Observing the forward passes of validation steps in place of some of our own, where that changes nothing."""

from __future__ import annotations

import gc
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.errors import FlatnessError
from lightning_flatness.layers.live import KEEPS_TENSORS, Listener, same_inputs
from lightning_flatness.measure.flatness import Measurement
from lightning_flatness.model.rows import num_rows


class LiveForwards:
    """Tries out in every measurement whether forward passes can be observed, and says which are used, when it changes.

    What the trial shows to be impossible is so for the run; what a batch shows, for the measurement.

    Args:
        wanted: whether they should be, if they can.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._heard: Listener | None = None
        self.forget()

    def forget(self) -> None:
        """In a new run everything is tried and told anew."""
        self._impossible = not self._wanted
        self._told: str | None = None
        self.begin()

    @property
    def listens(self) -> bool:
        """Whether the next batch is to be listened to."""
        return not (self._impossible or self._stopped)

    def begin(self) -> None:
        """A new measurement, with new weights."""
        self.let_go()
        self._tried = self._stopped = False

    def before(self, trainer: Trainer, measurement: Measurement, inputs: Any, targets: Tensor | None) -> None:
        """Listen for the forward pass on a batch that is about to be validated."""
        self.let_go()
        if num_rows(inputs, targets) < 2:  # one sample is measured twice, side by side
            return
        if not self._tried:
            self._tried = True
            reason = measurement.why_not_live(inputs, targets, trainer.precision_plugin.val_step_context)
            self._impossible = bool(reason)
            self.tell(reason)
        if not self._impossible:
            self._heard = measurement.listen(inputs)
            self._heard.__enter__()

    def after(self, measurement: Measurement, inputs: Any, targets: Tensor | None) -> bool:
        """Add what was heard of these inputs to a measurement; False, if a pass of our own must do it."""
        heard = self._heard
        if heard is None:
            return False
        heard.__exit__()
        reason, measured = heard.reason, False
        try:
            if not reason and same_inputs(inputs, heard.inputs):
                measurement.update_observed(heard, targets)
                measured = True
        except (FlatnessError, RuntimeError) as error:
            # A pass of our own will say what is wrong, if anything is; or it takes less memory.
            reason = f"the forward pass of a batch could not be used ({error})"
        alive = heard.graph()
        self.let_go()
        if alive() is not None:
            gc.collect()
        if not reason and alive() is not None:
            reason = KEEPS_TENSORS
        if reason:
            self._stopped = True
            self.tell(reason)
        return measured

    def let_go(self) -> None:
        """Remove hooks, and forget what was heard."""
        if self._heard is not None:
            self._heard.__exit__()
            self._heard.release()
        self._heard = None

    def refuse(self, reason: str) -> None:
        """Listen no more in this run."""
        if not self._impossible:
            self._impossible = True
            self.tell(reason)

    def tell(self, reason: str) -> None:
        """Which passes are used, unless that was told last."""
        if reason != self._told:
            rank_zero_info(
                f"FlatnessCallback measures in forward passes of its own: {reason}."
                if reason
                else "FlatnessCallback observes the forward passes of validation and needs none of its own."
            )
        self._told = reason
