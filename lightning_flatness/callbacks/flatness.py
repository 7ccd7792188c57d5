"""Flatness of a network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn

from lightning_flatness.callbacks import tensorboard
from lightning_flatness.callbacks.arguments import check_arguments, check_counts
from lightning_flatness.callbacks.data.loaders import flat_loaders
from lightning_flatness.callbacks.data.sources import ReadApart, Samples, Validated
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer
from lightning_flatness.callbacks.live import LiveForwards
from lightning_flatness.callbacks.logged import log, logging_muted, values_of, with_logarithm
from lightning_flatness.callbacks.network import find_network
from lightning_flatness.callbacks.rank_errors import RankErrors
from lightning_flatness.layers.options import MEASURES, Options
from lightning_flatness.measure.flatness import Measurement
from lightning_flatness.plots.history import DATA
from lightning_flatness.results import FlatnessReport, LayerInfo, summary_table

# What a record of the history says beside the measures.
ABOUT = ("epoch", "step", "accuracy")


class FlatnessCallback(Callback):
    """Log the Hessian trace and relative flatness of convolutions and linear layers at every validation.

    Logged, so that ``ModelCheckpoint``, schedulers and :class:`~lightning_flatness.FlatnessStopping` can monitor it:

    ===========================================  ======================================================================
    ``{prefix}/hessian_trace``                   loss per squared weight, sum over the measured layers
    ``{prefix}/relative_flatness``               loss, sum over the measured layers
    ``{prefix}/log10_relative_flatness``         for charts that have accuracy in them too; NaN where not positive
    ``{prefix}/weight_norm``                     norm of the measured kernels, the baseline to compare with
    ``{prefix}/{layer}/hessian_trace``           with more than one layer
    ``{prefix}/{layer}/relative_flatness``       with more than one layer
    ===========================================  ======================================================================

    Training with it is bit-identical to training without it.

    Args:
        layers: ``"last"``, the last convolution before the classifier; ``"classifier"``; ``"all"``, every convolution
            and linear layer; or names or glob patterns.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"``, ``"mse"``, or a function to per-sample losses; this and
            the arguments after ``figures`` are those of :func:`~lightning_flatness.measure_flatness`.
        data: ``"val"``: the batches that are validated. ``"train"``: a fixed random subset of the training data, in
            evaluation mode, through a loader of its own; the papers define flatness on the training loss. Or a
            ``DataLoader`` or list of batches, of which every rank measures its share.
        every_n_epochs: epochs from one measurement to the next; the first validation is always measured.
        max_samples: measure a fixed random subset of this size, over all ranks, in which every class has its share
            where the data set has ``targets`` or ``labels``. By default all, or 4,096 samples of the training data.
            (So many batches of a ``DataLoader`` with ``batch_size=None``.)
        prefix: of the logged keys; give several callbacks in one Trainer different ones.
        accuracy: logged name of the accuracy that belongs beside flatness in charts; by default the first logged name
            that has ``acc`` in it, one with ``val`` if there is one.
        model: attribute of the LightningModule that is the network, e.g. ``"net"``, or a function from the
            LightningModule to the network; by default the LightningModule.
        batch_fn: function from a batch to ``(inputs, targets)``; by default a batch is such a pair, or has one entry
            like ``image`` and one like ``label``.
        summary: print before training which layers are measured, and how that was certified.
        figures: draw accuracy and flatness, and the block traces, for TensorBoard at the end of training.
        strict: refuse layers whose number would not be the Hessian's: before the first epoch, or with the batch that
            shows it.
        label_smoothing: of cross-entropy.
        class_weight: of cross-entropy.
        ignore_index: of cross-entropy.
        measures: without ``"relative_flatness"`` only diagonals are kept; logged are then the Hessian trace, its
            logarithm and the weight norm. All other measures are in :attr:`report`.
        tolerance: relative standard error that is accepted with many classes.
        residual: ``"hutchinson"`` to estimate what Gauss-Newton leaves out.
        num_probes: for that.
        seed: of the probes.
        dtype: ``"float32"`` or ``"float64"``, to measure in; by default the model's own, at least float32.
        live: observe the forward passes of the validation step, where that is shown to change nothing, in place of
            passes of the callback's own. False: always its own.
        on_error: ``"raise"``; or ``"warn"`` and train on: a measurement that fails logs nothing.

    Attributes:
        history: a record (plain numbers, by name) for every measurement of a fit; kept in checkpoints.
        report: the last measurement, a :class:`~lightning_flatness.FlatnessReport`. (After a fit with a strategy that
            spawns processes, both are left behind in these; what was logged comes back.)
        num_measurements: how many there were, in validation and tests, too.

    Raises:
        FlatnessError: wrong arguments; and, before the first epoch, anything that cannot be measured.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FlatnessCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "last",
        # Functions first: a command line takes the first type that fits.
        loss: Callable[[Tensor, Tensor], Tensor] | nn.Module | str = "cross_entropy",
        data: Literal["val", "train"] | Iterable[Any] = "val",
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        prefix: str = "flatness",
        accuracy: str | None = None,
        model: Callable[[Any], Any] | str | None = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor | None]] | None = None,
        summary: bool = True,
        figures: bool = True,
        strict: bool = False,
        label_smoothing: float = 0.0,
        class_weight: list[float] | None = None,
        ignore_index: int = -100,
        measures: Sequence[str] = MEASURES,
        tolerance: float = 0.01,
        residual: Literal["hutchinson"] | None = None,
        num_probes: int = 16,
        seed: int = 0,
        dtype: Literal["float32", "float64"] | None = None,
        live: bool = True,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        self._options: dict[str, Any] = {
            "layers": layers,
            "loss": loss,
            "label_smoothing": label_smoothing,
            "class_weight": class_weight,
            "ignore_index": ignore_index,
            "measures": measures,
            "tolerance": tolerance,
            "residual": residual,
            "num_probes": num_probes,
            "seed": seed,
            "strict": strict,
            "dtype": dtype,
        }
        self._diagonal = Options(**self._options).diagonal  # refuses what cannot be
        check_arguments("FlatnessCallback", data, on_error, prefix)
        check_counts("FlatnessCallback", every_n_epochs=every_n_epochs)
        check_counts("FlatnessCallback", or_none=True, max_samples=max_samples)
        self.data = data
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.prefix = prefix
        self.accuracy = accuracy
        self.model = model
        self.batch_fn = batch_fn
        self.summary = summary
        self.figures = figures
        self.history: list[dict[str, float | None]] = []
        self.report: FlatnessReport | None = None
        self._stage: str | None = None
        self._restored = False
        self._certified: dict[str, LayerInfo] | None = None
        self._left_out: dict[str, str] = {}
        self._chart_laid_out = False
        self.num_measurements = 0
        self._faults = RankErrors(on_error)
        self._source: Validated | ReadApart = (
            Validated(batch_fn, max_samples)
            if isinstance(data, str) and data == "val"
            else ReadApart(batch_fn, max_samples, data)
        )
        self._live = LiveForwards(wanted=live)
        self._due = False
        self._measurement: Measurement | None = None
        self._unrecorded = False
        self._accuracy_missing = False

    # ---------------------------------------------------------------------------------------------------------- state

    @property
    def state_key(self) -> str:
        """Tells several instances apart in a checkpoint."""
        return f"FlatnessCallback[prefix={self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain numbers."""
        return {"history": [dict(record) for record in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history of a checkpoint, to go on with it; validating a checkpoint does not change the history."""
        if self._stage in (None, "fit"):
            self.history = [dict(record) for record in state_dict["history"]]
            self._restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the stage: a checkpoint is loaded in every one of them."""
        self._stage = stage
        self._live.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of data and model."""
        self._stage = None
        self._let_go()

    def _let_go(self) -> None:
        self._source.let_go()
        self._live.let_go()
        self._measurement = None
        self._due = False
        self._faults.clear()

    # ------------------------------------------------------------------------------------------------ before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new history, and refuse or warn about what is clear already."""
        if not self._restored:
            self.history = []
        self._restored = False
        self.report = None
        self._unrecorded = self._accuracy_missing = False
        self._certified = None
        self._faults.forget()
        self._chart_laid_out = False
        self._let_go()
        with self._measuring(trainer, pl_module):
            find_network(pl_module, self.model)
        if self._of_validation and not trainer.enable_validation:
            self._warn_no_validation()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certify on one batch, unless the sanity check has, and print the summary."""
        has_loaders = trainer.enable_validation and flat_loaders(trainer.val_dataloaders)
        if self._of_validation and has_loaders and not sum(trainer.num_val_batches):
            self._warn_no_validation()
        with self._measuring(trainer, pl_module):
            samples = None if self._certified else self._source.preview(trainer, pl_module)
            if samples is not None and not self._faults:
                self._certify(pl_module, samples)
        well = self._faults.settled("the start of training")
        if well and self.summary and self._certified and trainer.is_global_zero:
            data = DATA.get(self._data_name, self._data_name)
            title = f"Flatness on {data} data is measured for these layers, under '{self.prefix}'."
            Console().print(summary_table(self._certified, self._left_out, title))

    def _new_measurement(self, pl_module: LightningModule) -> Measurement:
        return Measurement(find_network(pl_module, self.model), **self._options)

    def _certify(self, pl_module: LightningModule, samples: Samples) -> None:
        measurement = self._new_measurement(pl_module)
        measurement.update(*samples)
        self._certified = dict(measurement.layers)
        self._left_out = dict(measurement.left_out)

    # ------------------------------------------------------------------------------------------------------- measuring

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement, if one is due."""
        self._begin(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen for the forward pass on this batch."""
        self._listen(trainer, pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the batch that was validated, or the next part of the training subset."""
        if trainer.sanity_checking:
            with self._measuring(trainer, pl_module):
                if self._certified is None and isinstance(self._source, Validated) and not self._faults:
                    self._certify(pl_module, self._source.samples_of(batch))
            return
        self._advance(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; this early, every callback and scheduler that monitors sees it in the same epoch."""
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pair flatness with accuracy, which the module may log later than this callback."""
        self._record(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._begin(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self._listen(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation."""
        self._advance(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._finish(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation, measure here what is read apart."""
        if not self._of_validation and not trainer.enable_validation:
            self._begin(trainer, pl_module, None, [])
            self._finish(trainer, pl_module)
            if self._unrecorded:
                self._record(trainer)
                # The module logs its accuracy after this hook; what is there now is the last epoch's.
                self._accuracy_missing = True
                self.history[-1]["accuracy"] = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pair the accuracy that the module logged at the end of the epoch before."""
        self._pair_missing_accuracy(trainer)

    def _pair_missing_accuracy(self, trainer: Trainer) -> None:
        if self._accuracy_missing and self.history:
            self._accuracy_missing = False
            self.history[-1]["accuracy"] = self._logged_accuracy(trainer)

    def _begin(
        self, trainer: Trainer, pl_module: LightningModule, loaders: Any, num_batches: Sequence[int | float]
    ) -> None:
        self._measurement = None
        self._due = not trainer.sanity_checking and self._is_due(trainer)
        if self._due and self._data_name == "train" and trainer.state.fn != "fit":
            rank_zero_warn("FlatnessCallback(data='train') measures during fit only; nothing is measured now.")
            self._due = False
        if not self._due:
            return
        with self._measuring(trainer, pl_module):
            self._source.begin(trainer, pl_module, loaders, num_batches)
            self._measurement = self._new_measurement(pl_module)
            self._live.begin()

    def _listen(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        source = self._source
        if self._measurement is None or self._faults or not isinstance(source, Validated) or not self._live.listens:
            return
        if source.why_not_live:
            self._live.refuse(source.why_not_live)
            return
        with self._measuring(trainer, pl_module):
            self._live.before(trainer, self._measurement, *source.samples_of(batch))

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or not self.history:
            return True
        last = int(self.history[-1]["epoch"] or 0)
        return trainer.current_epoch == last or trainer.current_epoch - last >= self.every_n_epochs

    def _advance(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        # In batch_end, since weight averaging swaps the weights between epoch_start and epoch_end.
        if self._measurement is None or self._faults:
            return
        with self._measuring(trainer, pl_module):
            for samples in self._source.parts(trainer, pl_module, batch, batch_idx, dataloader_idx):
                if not self._live.after(self._measurement, *samples):
                    self._measurement.update(*samples)
        self._live.let_go()  # a batch of which nothing is to be measured was listened to, too

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._due:
            self._log_again(trainer, pl_module)
            return
        self._due = False
        measurement, self._measurement = self._measurement, None
        if measurement is not None and not self._faults:
            with self._measuring(trainer, pl_module):
                for samples in self._source.rest(trainer, pl_module):
                    measurement.update(*samples)
        where = f"epoch {trainer.current_epoch}"
        if not self._faults.settled(where):
            return
        assert measurement is not None
        with self._measuring(trainer, pl_module):
            self.report = measurement.report()
        if not self._faults.settled(where):
            return
        self.num_measurements += 1
        self._unrecorded = trainer.state.fn == "fit"
        values = values_of(self.report, self._measures)
        log(pl_module, self.prefix, with_logarithm(values, self._measures[-1]))

    def _log_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume where nothing is due, let monitors find the last values, as they would without the stop."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and self.history and f"{self.prefix}/{self._measures[-1]}" not in trainer.callback_metrics:
            last = {key: value for key, value in self.history[-1].items() if key not in ABOUT and value is not None}
            log(pl_module, self.prefix, with_logarithm(last, self._measures[-1]))

    @property
    def _measures(self) -> list[str]:
        return ["hessian_trace", "relative_flatness"][: 1 if self._diagonal else 2]

    # ------------------------------------------------------------------------------------------------------- pictures

    def _record(self, trainer: Trainer) -> None:
        if not self._unrecorded or self.report is None or trainer.sanity_checking:
            return
        self._unrecorded = False
        about = (trainer.current_epoch, trainer.global_step, self._logged_accuracy(trainer))
        self.history.append({**dict(zip(ABOUT, about, strict=True)), **values_of(self.report, self._measures)})
        registered: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks = [callback for callback in registered if isinstance(callback, FlatnessCallback)]
        if not any(callback._chart_laid_out for callback in callbacks):
            self._chart_laid_out = True
            tensorboard.add_joint_charts(trainer, _joint_charts(trainer, callbacks))

    def _logged_accuracy(self, trainer: Trainer) -> float | None:
        logged = trainer.callback_metrics.get(self._accuracy_key(trainer) or "")
        return None if logged is None else float(logged)

    def _accuracy_key(self, trainer: Trainer) -> str | None:
        names = [name for name in trainer.callback_metrics if "acc" in name.lower()]
        key = self.accuracy or next((name for name in names if "val" in name.lower()), next(iter(names), None))
        # Logged on steps and on epochs, the loggers know it by this name only.
        return f"{key}_epoch" if f"{key}_epoch" in trainer.callback_metrics else key

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves on two axes, and the block traces as they are now."""
        self._pair_missing_accuracy(trainer)
        if self.figures and self.history and self.report is not None:
            accuracy = self._accuracy_key(trainer)
            tensorboard.add_figures(trainer, self.prefix, self.history, self.report, accuracy, self._data_name)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished measurement; keep the figures of a run that was interrupted by hand."""
        self._let_go()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self.on_train_end(trainer, pl_module)

    # -------------------------------------------------------------------------------------------------------- details

    @contextmanager
    def _measuring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        with self._faults.kept(trainer.world_size), logging_muted(pl_module):
            yield

    @property
    def _of_validation(self) -> bool:
        return isinstance(self._source, Validated)

    @property
    def _data_name(self) -> str:
        return self.data if isinstance(self.data, str) else "given"

    def _warn_no_validation(self) -> None:
        rank_zero_warn(
            "FlatnessCallback measures at validation, and this fit runs none (no validation_step, no validation data, "
            f"or limit_val_batches=0): '{self.prefix}/hessian_trace' and its kin will not be logged, and what monitors "
            "them will fail. Add validation data, or use FlatnessCallback(data='train')."
        )


def _joint_charts(trainer: Trainer, callbacks: Sequence[FlatnessCallback]) -> list[list[str]]:
    """Accuracy and flatness together: of every callback, and, if there are several, of all."""
    accuracies = [callback._accuracy_key(trainer) for callback in callbacks]
    tags = [f"{callback.prefix}/log10_{callback._measures[-1]}" for callback in callbacks]
    pairs = [([] if key is None else [key], tag) for key, tag in zip(accuracies, tags, strict=True)]
    charts = [[*key, tag] for key, tag in pairs]
    keys = [key for of_callback, _ in pairs for key in of_callback]
    return [[*dict.fromkeys(keys), *tags], *charts] if len(callbacks) > 1 else charts
