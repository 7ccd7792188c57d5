"""What is measured at the end of a fit, and every few epochs: data, records, files, loggers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatness.callbacks import tensorboard
from lightning_flatness.callbacks.arguments import check_arguments, check_counts
from lightning_flatness.callbacks.data.loaders import flat_loaders
from lightning_flatness.callbacks.data.sources import ReadApart, Samples
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer, is_weight_averaging
from lightning_flatness.callbacks.logged import log, logging_muted
from lightning_flatness.callbacks.network import find_network
from lightning_flatness.callbacks.rank_errors import RankErrors
from lightning_flatness.errors import FlatnessError, LandscapeError

DEFAULT_SAMPLES = 512
Record = dict[str, Any]


class EpochEndCallback(Callback):
    """Measures the weights that are trained at the end of epochs, and those that are left at the end of the fit.

    At the end of an epoch, not in validation, since there every rank arrives, with or without validation data, and
    weight averaging swaps nothing. Samples are read apart, into memory, since they are passed over many times.

    Args:
        data: ``"train"``, ``"val"``, or a loader or batches.
        max_samples: a fixed random subset; by default 512 of training or validation data, all of data that are given.
        every_n_epochs: the first epoch and every n-th after it; None for the end of the fit only.
        prefix: of keys, tags and the folder.
        model: of the LightningModule.
        batch_fn: from a batch to ``(inputs, targets)``.
        folder: for files; by default ``prefix`` in the Trainer's ``log_dir``.
        figures: draw for TensorBoard.
        on_error: ``"raise"`` or ``"warn"``.
        measured: what it is that is measured, for messages.

    Raises:
        FlatnessError: arguments that cannot be.
    """

    def __init__(
        self,
        data: Literal["train", "val"] | Iterable[Any],
        max_samples: int | None,
        every_n_epochs: int | None,
        prefix: str,
        model: Callable[[Any], Any] | str | None,
        batch_fn: Callable[[Any], tuple[Any, Tensor | None]] | None,
        folder: str | Path | None,
        figures: bool,
        on_error: Literal["raise", "warn"],
        measured: str,
    ) -> None:
        name = type(self).__name__
        check_arguments(name, data, on_error, prefix)
        check_counts(name, or_none=True, max_samples=max_samples, every_n_epochs=every_n_epochs)
        self.data = data
        self.max_samples = DEFAULT_SAMPLES if max_samples is None and isinstance(data, str) else max_samples
        self.every_n_epochs = every_n_epochs
        self.prefix = prefix
        self.model = model
        self.batch_fn = batch_fn
        self.folder = folder
        self.figures = figures
        self.history: list[Record] = []
        self._faults = RankErrors(on_error, name, measured)
        self._stage: str | None = None
        self._restored = False

    # ------------------------------------------------------------------------------------------------ of the subclass

    @abstractmethod
    def _try(self, trainer: Trainer, network: nn.Module, batches: list[Samples]) -> None:
        """Find out on one batch, before training, what cannot be measured. On every rank."""

    @abstractmethod
    def _compute(self, trainer: Trainer, network: nn.Module, batches: list[Samples], progress: bool | None) -> Record:
        """Measure, keep the result, and return plain numbers, text or lists for the history. On every rank."""

    @abstractmethod
    def _write(self, stem: Path) -> None:
        """Write the result to files whose names begin so. On rank zero."""

    @abstractmethod
    def _draw(self) -> Mapping[str, Any]:
        """Figures of the result, by tag."""

    def _draw_history(self) -> Mapping[str, Any]:
        """Figures of the history, by tag."""
        return {}

    def _logged(self, record: Record) -> dict[str, float]:
        """Scalars by key without prefix."""
        return {}

    def _forget(self) -> None:
        """Drop what a former fit has left."""

    def _ready(self, final: bool) -> bool:
        """Whether there is something to measure."""
        return True

    @property
    def _interrupted(self) -> bool:
        """Whether the user ended the last measurement by hand."""
        return False

    # ---------------------------------------------------------------------------------------------------------- state

    @property
    def state_key(self) -> str:
        """Tells several instances apart in a checkpoint."""
        return f"{type(self).__name__}[prefix={self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain numbers, text and lists."""
        return {"history": [dict(record) for record in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history of a checkpoint, to go on with it; validating a checkpoint does not change it."""
        if self._stage in (None, "fit"):
            self.history = [dict(record) for record in state_dict["history"]]
            self._restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the stage: a checkpoint is loaded in every one of them."""
        self._stage = stage

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of what was kept for this fit."""
        self._stage = None
        self._faults.clear()

    # ------------------------------------------------------------------------------------------------ before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new history, and refuse what is clear already."""
        if not self._restored:
            self.history = []
        self._restored = False
        self._faults.forget()
        self._forget()
        self._warn_averaged_later(trainer)
        self._warn_monitored_earlier(trainer)
        with self._measuring(trainer, pl_module):
            find_network(pl_module, self.model)
            if self._is("val") and not trainer.enable_validation:
                raise FlatnessError("data='val', and this fit has no validation. Use data='train' or data of your own.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try it on one batch, so that an error comes now and not at the end of training."""
        batches: list[Samples] = []
        seen = self._has_data(trainer)
        if seen:
            with self._measuring(trainer, pl_module):
                source = self._source(trainer)
                first = source.preview(trainer, pl_module)
                batches = [] if first is None else [first]
        where = "the start of training"
        if self._faults.settled(where) and seen:
            with self._measuring(trainer, pl_module):
                self._try(trainer, find_network(pl_module, self.model), batches)
            self._faults.settled(where)

    # ------------------------------------------------------------------------------------------------------- measuring

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, if it is due; this early, callbacks that monitor see it in the same epoch."""
        due = self.every_n_epochs is not None and trainer.current_epoch % self.every_n_epochs == 0
        if due and self._has_data(trainer) and self._ready(final=False):
            self._measure(trainer, pl_module, trainer.current_epoch, final=False)
        elif self.history and self.every_n_epochs is not None:
            # After a resume where nothing is due, let monitors find the last values, as they would without the stop.
            values = self._logged(self.history[-1]).items()
            known = trainer.callback_metrics
            log(pl_module, self.prefix, {key: value for key, value in values if f"{self.prefix}/{key}" not in known})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is left, unless the last epoch has, and draw the history."""
        done = bool(self.history) and self.history[-1]["step"] == trainer.global_step
        if not self._has_data(trainer):
            name = type(self).__name__
            rank_zero_warn(f"{name}(data='val') has measured nothing, as there was no validation in this fit.")
        elif (not done or self._averaged(trainer)) and self._ready(final=True):
            self._measure(trainer, pl_module, max(0, trainer.current_epoch - 1), final=True)
        self._add_history(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished measurement; keep the figures of a run that was interrupted by hand."""
        self._faults.clear()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._add_history(trainer)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int, final: bool) -> None:
        where = "the end of the fit" if final else f"epoch {epoch}"
        batches: list[Samples] = []
        with self._measuring(trainer, pl_module):
            source = self._source(trainer)
            source.begin(trainer, pl_module, None, [])
            batches = list(source.rest(trainer, pl_module))
        if not self._faults.settled(where):  # before what all ranks do together
            return
        record: Record = {}
        name = f"epoch={epoch}-step={trainer.global_step}{'-averaged' if final and self._averaged(trainer) else ''}"
        with self._measuring(trainer, pl_module):
            show = None if final and trainer.is_global_zero else False
            try:
                record = self._compute(trainer, find_network(pl_module, self.model), batches, show)
            except LandscapeError:  # on all ranks
                self._write_files(trainer, name, where)
                raise
        if not self._faults.settled(where):
            return
        self.history.append({"epoch": epoch, "step": trainer.global_step, **record})
        self._log(trainer, pl_module, self._logged(self.history[-1]), final)
        self._write_files(trainer, name, where)
        if self.figures:
            tensorboard.add_drawn(trainer, self.prefix, self._draw, type(self).__name__)
        if self._interrupted and not final:
            raise KeyboardInterrupt  # it was meant for the training, too

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float], final: bool) -> None:
        if not final:
            log(pl_module, self.prefix, values)
        elif values:
            for logger in trainer.loggers:  # Lightning's log() is not possible any more
                logger.log_metrics(
                    {f"{self.prefix}/{key}": value for key, value in values.items()},
                    step=tensorboard.last_step(trainer),
                )
                logger.save()

    def _write_files(self, trainer: Trainer, name: str, where: str) -> None:
        """Nothing in a trial run, ``fast_dev_run``."""
        found = trainer.log_dir  # a collective
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(self.folder) if self.folder is not None else Path(found or trainer.default_root_dir) / self.prefix
        if trainer.is_global_zero:
            with self._faults.kept(trainer.world_size):
                folder.mkdir(parents=True, exist_ok=True)
                self._write(folder / name)
        self._faults.settled(f"the files of {where}")

    # -------------------------------------------------------------------------------------------------------- details

    def _add_history(self, trainer: Trainer) -> None:
        if self.figures and len(self.history) > 1:
            tensorboard.add_drawn(trainer, self.prefix, self._draw_history, type(self).__name__)

    def _source(self, trainer: Trainer) -> ReadApart:
        data = self.data
        if self._is("val"):
            loaders = flat_loaders(trainer.val_dataloaders)
            if len(loaders) != 1:
                raise FlatnessError(
                    f"data='val' needs one validation loader, and there are {len(loaders)}. Give one of them as data=."
                )
            data = loaders[0]
        return ReadApart(self.batch_fn, self.max_samples, data)

    def _averaged(self, trainer: Trainer) -> bool:
        """Whether weight averaging has put its weights in place when this callback comes at the end of the fit."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return any(is_weight_averaging(callback) for callback in callbacks[: callbacks.index(self)])

    def _warn_averaged_later(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(is_weight_averaging(callback) for callback in callbacks) and not self._averaged(trainer):
            name = type(self).__name__
            rank_zero_warn(
                f"WeightAveraging comes after {name}, which measures the trained weights at the end of the fit, not "
                f"the averaged ones that are left. To measure these, list {name} after WeightAveraging."
            )

    def _warn_monitored_earlier(self, trainer: Trainer) -> None:
        """Where validation is not at the end of every epoch, Lightning's monitors look there, before this callback."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [
            type(callback).__name__
            for callback in callbacks
            if str(getattr(callback, "monitor", None)).startswith(f"{self.prefix}/")
        ]
        often = trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch != 1
        if monitors and trainer.enable_validation and often and self.every_n_epochs is not None:
            rank_zero_warn(
                f"{', '.join(monitors)}: '{self.prefix}/...' is measured at the end of epochs, and as validation is "
                "not just there, monitors look earlier and find that of an epoch before, or nothing. Give "
                "ModelCheckpoint save_on_train_epoch_end=True, EarlyStopping check_on_train_epoch_end=True."
            )

    def _has_data(self, trainer: Trainer) -> bool:
        """Lightning sets up validation data only before the first validation."""
        return not self._is("val") or trainer.val_dataloaders is not None

    def _is(self, data: str) -> bool:
        return isinstance(self.data, str) and self.data == data

    @contextmanager
    def _measuring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        with self._faults.kept(trainer.world_size), logging_muted(pl_module):
            yield
