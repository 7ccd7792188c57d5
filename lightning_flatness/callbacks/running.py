"""A measurement in progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_flatness.callbacks.data.sources import SeparateData, ValidationBatches, split_with
from lightning_flatness.callbacks.live import LiveForwards
from lightning_flatness.measure.flatness import Measurement


@dataclass(frozen=True)
class Running:
    """A measurement in progress: its sums so far, and where its samples come from.

    Args:
        measurement: the sums.
        source: of the samples.
        live: observes the forward passes of validation steps; None where extra passes measure every batch.
    """

    measurement: Measurement
    source: ValidationBatches | SeparateData
    live: LiveForwards | None

    def before_step(self, batch: Any) -> None:
        """Listen for the forward pass on a batch that is about to be validated."""
        if self.live is not None:
            self.live.before_step(*split_with(None, batch))

    def after_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Measure what is due after a batch was validated."""
        for inputs, targets in self.source.after_step(batch, batch_idx, dataloader_idx):
            if self.live is None or not self.live.after_step(inputs, targets):
                self.measurement.update(inputs, targets)

    def measure_rest(self) -> None:
        """Measure what is left when all batches have been validated."""
        for inputs, targets in self.source.rest():
            self.measurement.update(inputs, targets)

    def release(self) -> None:
        """Drop an observed forward pass."""
        if self.live is not None:
            self.live.release()
