"""The base class of callbacks that measure at the end of a fit and, on request, at the end of epochs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_flatness.callbacks.averaging import (
    call_again_after_others,
    call_once,
    have_changed,
    is_called_again,
    leaves_averages,
    warn_of_initial_weights,
    weights_sample,
)
from lightning_flatness.callbacks.base import MeasuringCallback, Record
from lightning_flatness.callbacks.data.loaders import flat_loaders
from lightning_flatness.callbacks.data.sources import Samples, SeparateData
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, callbacks_of
from lightning_flatness.callbacks.logged import log, log_failure
from lightning_flatness.callbacks.loggers import logged_step
from lightning_flatness.callbacks.monitors import watched_keys
from lightning_flatness.callbacks.stopwatch import Stopwatch
from lightning_flatness.checks import check_whole
from lightning_flatness.errors import FlatnessError, LandscapeError
from lightning_flatness.measure.ranks import gather

DEFAULT_SAMPLES = 512


class EpochEndCallback(MeasuringCallback):
    """Base class of callbacks that measure the network at the end of epochs and at the end of the fit.

    The end of a training epoch is a good time for two reasons: all ranks reach it, even without validation data, and
    Lightning's weight averaging has not swapped the averaged weights in. At the end of the fit, the callback measures
    the final weights, after all other callbacks have changed the weights as they want.

    The samples stay in memory during a measurement, because a measurement iterates over them many times. ``arguments``
    are the other arguments of :class:`MeasuringCallback`.
    """

    def __init__(
        self,
        measured: str,
        every_n_epochs: int | None,
        folder: str | Path | None,
        data: str | Iterable[Any],
        max_samples: int | None,
        *arguments: Any,
    ) -> None:
        name = type(self).__name__
        max_samples = DEFAULT_SAMPLES if max_samples is None and isinstance(data, str) else max_samples
        super().__init__(name, measured, data, max_samples, *arguments)
        check_whole(f"{name}: every_n_epochs", every_n_epochs, least=1, or_none=True)
        self.every_n_epochs = every_n_epochs
        self.folder = folder
        self._measured: Mapping[str, Tensor] | None = None  # copies of some of the latest measured weights

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to measure after this epoch.

        Override this method for another schedule, which must be the same on all ranks.
        """
        return self.every_n_epochs is not None and trainer.current_epoch % self.every_n_epochs == 0

    @abstractmethod
    def _try(self, trainer: Trainer, network: nn.Module, batches: list[Samples]) -> None:
        """Make a minimal measurement on one batch, to raise errors before training. All ranks call this method."""

    @abstractmethod
    def _compute(self, trainer: Trainer, network: nn.Module, batches: list[Samples], progress: bool | None) -> Record:
        """Measure, store the result for :meth:`_write`, and return a record for the history. All ranks call this."""

    @abstractmethod
    def _accept(self) -> None:
        """Make the stored result public, e.g. as ``result``. All ranks call this after its record is in the history."""

    @abstractmethod
    def _write(self, stem: Path) -> list[Path]:
        """Write the stored result to files whose paths start with ``stem``, and return the paths.

        Only rank zero calls this. After an error in the measurement, the stored result is what was computed until then.
        """

    @abstractmethod
    def _figures(self) -> dict[str, Any]:
        """Draw the latest result, and the history if it has several records. Return a dict from tags to figures."""

    def _logged(self, record: Record) -> dict[str, float]:
        """Return those values of a record that are to be logged, as a dict whose keys have no prefix."""
        return {}

    @staticmethod
    def _say(level: int, message: str) -> None:
        """Print, on rank zero, a message about the time or work of a measurement. ``level`` is not used."""
        rank_zero_info(message)

    def _is_ready(self, final: bool) -> bool:
        """Return whether everything that the measurement needs is available."""
        return True

    @property
    def _follows_steps(self) -> bool:
        """Return False, because the data are read apart from validation, also with ``data="val"``."""
        return False

    @property
    def _is_interrupted(self) -> bool:
        """Whether the user has interrupted the latest measurement with Ctrl-C."""
        return False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history. Raise an error, or warn, if a problem can be found before training."""
        self._measured = None
        self._warn_monitored_earlier(trainer)
        super().on_fit_start(trainer, pl_module)
        with self._measuring(trainer, pl_module):
            if self._data_name == "val" and not trainer.enable_validation:
                raise FlatnessError(
                    f"{self._name}: data='val' needs validation, and this fit has none. Use data='train' or data of "
                    "your own."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a trial measurement on one batch, so that errors are raised now and not at the end of training."""
        has_data, where = self._has_data(trainer), "the start of training"
        batches: list[Samples] = []
        if has_data:
            with self._measuring(trainer, pl_module):
                first = next(self._source(trainer, pl_module).rest(), None)
                batches = [] if first is None else [first]
        if self._errors.settle(where) and has_data:
            with self._measuring(trainer, pl_module):
                self._try(trainer, self._model_of(pl_module), batches)
            self._errors.settle(where)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log if a measurement is due. Callbacks that monitor a key read it later in the same epoch."""
        if self.is_due(trainer) and self._has_data(trainer) and self._is_ready(final=False):
            self._measure(trainer, pl_module, trainer.current_epoch, final=False)
        elif self.history and self.every_n_epochs is not None:
            # After a resume, log the last values again, so that callbacks that monitor these keys find values.
            values = self._logged(self.history[-1]).items()
            known = trainer.callback_metrics
            log(pl_module, self.prefix, {key: value for key, value in values if f"{self.prefix}/{key}" not in known})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights if they were not measured already, and draw the figures of the run.

        Other callbacks may change the weights in this hook. If such callbacks come later in the Trainer's list,
        Lightning calls this method a second time after them, and only the second call measures.
        """
        if call_again_after_others(trainer, self, MeasuringCallback):
            return
        warn_of_initial_weights(trainer, self._name)
        is_done = bool(self.history) and self.history[-1]["step"] == trainer.global_step
        is_done = is_done and not any(gather(self._have_changed(pl_module), sync=True))
        if not self._has_data(trainer):
            rank_zero_warn(
                f"{self._name}(data='val') has measured nothing, because this fit had no validation. To measure "
                "without validation, use data='train' or data of your own."
            )
        elif not is_done:
            self._measured = None  # of earlier weights
            if self._is_ready(final=True):
                self._measure(trainer, pl_module, max(0, trainer.current_epoch - 1), final=True)
        self._draw_run(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished measurement, and cancel the second call of :meth:`on_train_end`."""
        super().on_exception(trainer, pl_module, exception)
        call_once(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the weights have changed since the final measurement. Then drop the data and the model.

        All other callbacks and the LightningModule have had their ``on_fit_end`` by now, and may have changed weights.
        """
        if stage == "fit":
            self._warn_of_late_changes(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)
        self._measured = None
        call_once(trainer, self)

    def _warn_of_late_changes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_late = False
        with suppress(FlatnessError):  # another callback may have removed the network by now
            is_late = self._measured is not None and self._have_changed(pl_module)
        if is_late or is_called_again(trainer, self):
            rank_zero_warn(
                f"The final result of {self._name} does not belong to the final weights, because the weights have "
                "changed after the measurement. If another callback changes them, let it do this in on_train_end, and "
                f"list {self._name} after it."
            )

    def _have_changed(self, pl_module: LightningModule) -> bool:
        """Return whether the weights have changed since the last measurement, or were never measured."""
        return self._measured is None or have_changed(self._measured, self._model_of(pl_module))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int, final: bool) -> None:
        where = "the end of the fit" if final else f"epoch {epoch}"
        batches: list[Samples] = []
        self._stopwatch = Stopwatch()
        with self._measuring(trainer, pl_module):
            batches = list(self._source(trainer, pl_module).rest())
        if not self._is_settled(pl_module, where, final):  # computing is a collective, so no rank may have failed
            return
        suffix = self._suffix(trainer) if final else ""
        self._logged_step = logged_step(trainer)
        record: Record = {"epoch": epoch, "step": trainer.global_step}
        with self._measuring(trainer, pl_module):
            progress = None if final and trainer.is_global_zero else False
            network = self._model_of(pl_module)
            try:
                record |= self._compute(trainer, network, batches, progress)
            except LandscapeError:  # raised on all ranks
                self._write_files(trainer, record, suffix, where)
                raise
            self._measured = weights_sample(network)
        if not self._is_settled(pl_module, where, final):
            return
        self._append(record)
        self._accept()
        self._log(trainer, pl_module, self._logged(record), final)
        self._write_files(trainer, record, suffix, where)
        if final or self._draws_now:
            self._draw(trainer, self._figures, suffix)
        if self._is_interrupted and not final:
            raise KeyboardInterrupt  # end the training as well

    def _is_settled(self, pl_module: LightningModule, where: str, final: bool) -> bool:
        """Return True if all ranks have succeeded so far. Otherwise raise an error, or warn and log NaN."""
        if self._errors.settle(where):
            return True
        if self.history and not final:
            log_failure(pl_module, self.prefix, self._logged(self.history[-1]))
        return False

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float], final: bool) -> None:
        if not final:
            log(pl_module, self.prefix, values)
        elif values:  # Lightning does not allow log() at the end of the fit
            for logger in trainer.loggers:
                metrics = {f"{self.prefix}/{key}": value for key, value in values.items()}
                logger.log_metrics(metrics, step=self._logged_step)
                logger.save()

    def _write_files(self, trainer: Trainer, record: Record, suffix: str, where: str) -> None:
        """Write the result to files, except in a trial run (``fast_dev_run``)."""
        if getattr(trainer, "fast_dev_run", False):
            return
        if trainer.is_global_zero:
            with self._errors.kept(trainer.world_size):
                self.run_outputs.add_files(trainer, self._write, record, self._logged_step, suffix)
        self._errors.settle(where, f"write the files of {where}")

    def _draw_run(self, trainer: Trainer) -> None:
        if not self._is_drawn:
            self._draw(trainer, self._figures)

    def _has_data(self, trainer: Trainer) -> bool:
        """Return whether the data can be read. For validation data, Lightning must have set up a validation first."""
        return self._data_name != "val" or trainer.val_dataloaders is not None

    def _source(self, trainer: Trainer, pl_module: LightningModule) -> SeparateData:
        wanted = self._wanted
        if self._data_name == "val":
            loaders = flat_loaders(trainer.val_dataloaders)
            if len(loaders) != 1:
                raise FlatnessError(
                    f"{self._name}: data='val' needs one validation loader, and there are {len(loaders)}. Give one of "
                    "them as data=."
                )
            wanted = replace(wanted, data=loaders[0])
        return SeparateData(trainer, pl_module, wanted)

    def _suffix(self, trainer: Trainer) -> str:
        """Return a suffix for the files of the final measurement, so that file names are not used twice."""
        if any(map(leaves_averages, callbacks_of(trainer))):
            return "-averaged"
        is_second = bool(self.history) and self.history[-1]["step"] == trainer.global_step
        return "-final" if is_second else ""

    def _warn_monitored_earlier(self, trainer: Trainer) -> None:
        """Warn of callbacks such as ModelCheckpoint that would read a key before this callback logs it."""
        monitors = [
            type(callback).__name__
            for callback in callbacks_of(trainer)
            if any(key.startswith(f"{self.prefix}/") for key in watched_keys(callback))
        ]
        often = trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch != 1
        if monitors and trainer.enable_validation and often and self.every_n_epochs is not None:
            rank_zero_warn(
                f"{', '.join(monitors)}: '{self.prefix}/...' is measured at the end of epochs, but validation also "
                "runs at other times, or not in every epoch. So a callback that monitors this value may find the value "
                "of an earlier epoch, or no value. Set save_on_train_epoch_end=True in ModelCheckpoint, and "
                "check_on_train_epoch_end=True in EarlyStopping."
            )
