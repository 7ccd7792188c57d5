"""Keep the records of a FlatnessCallback: pair them with the accuracy, add them to the history, and draw them."""

from __future__ import annotations

from typing import Any

from lightning_flatness.callbacks.base import MeasuringCallback, Record
from lightning_flatness.callbacks.charts import add_charts_once
from lightning_flatness.callbacks.flatness_figures import flatness_figures, stopping_of
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, callbacks_of
from lightning_flatness.callbacks.logged import accuracy_of, log_failure, logged_values, where
from lightning_flatness.callbacks.loggers import logged_step
from lightning_flatness.results import FlatnessReport


class FlatnessHistory(MeasuringCallback):
    """Base class of FlatnessCallback, which keeps the history, adds accuracies to it, and draws it.

    ``accuracy`` is the key of the logged accuracy. ``measure`` names the measure that charts show. ``arguments`` are
    those of :class:`MeasuringCallback`.
    """

    def __init__(self, accuracy: str | None, measure: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accuracy = accuracy
        self._charted_measure = measure
        self.charted = f"{self.prefix}/log10_{measure}"  # key of the flatness value that has a chart
        self.report: FlatnessReport | None = None
        self.reports: dict[int, FlatnessReport] = {}
        self._awaits_accuracy: Record | None = None  # the latest record, as long as its accuracy is not known

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history. Raise an error, or warn, if a problem can be found before training."""
        self.report = self._awaits_accuracy = None
        self.reports = {}
        super().on_fit_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the record of this validation, with its accuracy, to the history.

        This callback logs flatness earlier, when the LightningModule may not have logged its accuracy yet. In this
        hook, the accuracy has been logged.
        """
        self._add_to_history(trainer)
        self._pair_accuracy(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a fit without validation, add the accuracy of the epoch that has ended to the latest record."""
        self._pair_accuracy(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a fit without validation, save the accuracy of the epoch that ends, which is known by now."""
        if self._awaits_accuracy is not None:
            self._awaits_accuracy["accuracy"] = accuracy_of(trainer.callback_metrics, self.accuracy)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _is_settled(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return True if all ranks have succeeded so far. Otherwise raise an error, or warn and log NaN."""
        if self._errors.settle(where(trainer)):
            return True
        if trainer.state.fn == "fit" and self.history:
            latest = logged_values(self.history[-1], self.history, self._charted_measure)
            log_failure(pl_module, self.prefix, latest)
        return False

    def _add_to_history(self, trainer: Trainer) -> None:
        if self._awaits_accuracy is not None:
            self._append(self._awaits_accuracy)
            self._logged_step = logged_step(trainer)
            add_charts_once(trainer, [other for other in callbacks_of(trainer) if isinstance(other, FlatnessHistory)])

    def _pair_accuracy(self, trainer: Trainer) -> None:
        record, self._awaits_accuracy = self._awaits_accuracy, None
        if record is not None:
            record["accuracy"] = accuracy_of(trainer.callback_metrics, self.accuracy)
            if self._draws_now:
                self._draw_flatness(trainer)

    def _draw_run(self, trainer: Trainer) -> None:
        self._pair_accuracy(trainer)
        if not self._is_drawn or stopping_of(trainer)["stopped"]:
            self._draw_flatness(trainer)

    def _draw_flatness(self, trainer: Trainer) -> None:
        if self.history and self.report is not None:
            drawn = (trainer, self.history, self.report, self.accuracy, self._data_name)
            self._draw(trainer, lambda: flatness_figures(*drawn))
