"""Flatness of a network while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn

from lightning_flatness.callbacks import tensorboard
from lightning_flatness.callbacks.network import find_network
from lightning_flatness.callbacks.samples import (
    FixedPositions,
    TrainingSubset,
    first_batch,
    flat_loaders,
    num_samples,
    select,
    to_device,
)
from lightning_flatness.capture import MEASURES, Options
from lightning_flatness.errors import FlatnessError
from lightning_flatness.metrics import Measurement, split_batch
from lightning_flatness.results import FlatnessReport, LayerInfo, summary_table


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

    Training with it is bit-identical to training without it. (One exception: with ``data="train"`` and a
    training loader without workers, a data set that keeps a random generator as its own attribute is advanced.)

    Args:
        layers: ``"last"``, the last convolution before the classifier; ``"classifier"``; ``"all"``, every convolution
            and linear layer; or names or glob patterns.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"``, ``"mse"``, or a function to per-sample losses; this and
            the arguments after ``figures`` are those of :func:`~lightning_flatness.measure_flatness`.
        data: ``"val"``: the batches that are validated. ``"train"``: a fixed random subset of the training data, in
            evaluation mode, through a loader of its own; the papers define flatness on the training loss.
        every_n_epochs: epochs from one measurement to the next; the first validation is always measured.
        max_samples: measure a fixed random subset of this size. By default all of the validation data, or 4,096 samples
            of the training data.
        prefix: of the logged keys; give several callbacks in one Trainer different ones.
        accuracy: logged name of the accuracy that belongs beside flatness in charts; by default the first logged name
            that has ``acc`` in it, one with ``val`` if there is one.
        model: attribute of the LightningModule that is the network, e.g. ``"net"``; by default the LightningModule.
        batch_fn: function from a batch to ``(inputs, targets)``; by default a batch is such a pair.
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

    Attributes:
        history: a record (plain numbers, by name) for every measurement of a fit; kept in checkpoints.
        report: the last measurement, a :class:`~lightning_flatness.FlatnessReport`.

    Raises:
        FlatnessError: wrong arguments; and, before the first epoch, anything that cannot be measured.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FlatnessCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "last",
        loss: str | nn.Module | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        data: Literal["val", "train"] = "val",
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        prefix: str = "flatness",
        accuracy: str | None = None,
        model: str | None = None,
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
        }
        self._diagonal = Options(**self._options).diagonal  # refuses what cannot be
        if data not in ("val", "train"):
            raise FlatnessError(f"FlatnessCallback: data is 'val' or 'train', not {data!r}.")
        if every_n_epochs < 1 or (max_samples is not None and max_samples < 1):
            raise FlatnessError(
                f"FlatnessCallback: every_n_epochs and max_samples must be positive; got {every_n_epochs=}, "
                f"{max_samples=}."
            )
        if not prefix:
            raise FlatnessError("FlatnessCallback: prefix must not be empty.")
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
        self._subset: TrainingSubset | None = None
        self._positions: FixedPositions | None = None
        self._measurement: Measurement | None = None
        self._batches_seen = 0
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

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of data and model."""
        self._stage = None
        self._subset = None
        self._measurement = None

    # ------------------------------------------------------------------------------------------------ before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new history, and refuse or warn about what is clear already."""
        if not self._restored:
            self.history = []
        self._restored = False
        self.report = None
        self._unrecorded = False
        self._certified = None
        self._chart_laid_out = False
        self._subset = None
        find_network(pl_module, self.model)
        if self.data == "val" and not trainer.enable_validation:
            self._warn_no_validation()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certify on one batch, unless the sanity check has, and print the summary."""
        batch = None
        if self.data == "train":
            rank, num_ranks = trainer.global_rank, trainer.world_size
            self._subset = TrainingSubset(trainer.train_dataloader, self.max_samples, rank, num_ranks)
            self._subset.restart(pl_module)
            batch = next(self._subset.up_to(0.0001), None)
        elif self._certified is None and trainer.enable_validation:
            loaders = flat_loaders(trainer.val_dataloaders)
            if loaders and not sum(trainer.num_val_batches):
                self._warn_no_validation()
            batch = first_batch(loaders, pl_module)  # none where Lightning has not set up validation yet
        if batch is not None:
            self._certify(trainer, pl_module, to_device(trainer, pl_module, batch))
        if self.summary and self._certified and trainer.is_global_zero:
            Console().print(summary_table(self._certified, self._left_out))

    def _new_measurement(self, trainer: Trainer, pl_module: LightningModule) -> Measurement:
        seed = self._options["seed"] + 1000 * trainer.global_rank  # probes of ranks are independent
        return Measurement(find_network(pl_module, self.model), **(self._options | {"seed": seed}))

    def _certify(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        measurement = self._new_measurement(trainer, pl_module)
        measurement.update(*self._split(batch))
        self._certified = dict(measurement.layers)
        self._left_out = dict(measurement.left_out)

    # ------------------------------------------------------------------------------------------------------- measuring

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement, if one is due."""
        self._begin(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

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
            if self._certified is None and self.data == "val":
                self._certify(trainer, pl_module, batch)
            return
        self._advance(trainer, pl_module, batch, trainer.num_val_batches)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; this early, every callback and scheduler that monitors sees it in the same epoch."""
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pair flatness with accuracy, which the module may log later than this callback."""
        self._record(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._begin(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

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
        self._advance(trainer, pl_module, batch, trainer.num_test_batches)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._finish(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation, measure the training subset here."""
        if self.data == "train" and not trainer.enable_validation:
            self._begin(trainer, pl_module, None, [])
            self._advance(trainer, pl_module, None, [1])
            self._finish(trainer, pl_module)
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
        if trainer.sanity_checking or not self._is_due(trainer):
            return
        if self.data == "train" and trainer.state.fn != "fit":
            rank_zero_warn("FlatnessCallback(data='train') measures during fit only; nothing is measured now.")
            return
        self._measurement = self._new_measurement(trainer, pl_module)
        self._batches_seen = 0
        if self._subset is not None:
            self._subset.restart(pl_module)
        elif self.max_samples is not None:
            self._positions = FixedPositions(self.max_samples, num_samples(loaders, num_batches))

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or not self.history:
            return True
        last = int(self.history[-1]["epoch"] or 0)
        return trainer.current_epoch == last or trainer.current_epoch - last >= self.every_n_epochs

    def _advance(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, num_batches: Sequence[int | float]
    ) -> None:
        # In batch_end, since weight averaging swaps the weights between epoch_start and epoch_end.
        if self._measurement is None:
            return
        self._batches_seen += 1
        if self._subset is not None:
            # In step with validation, so that its progress bar tells the truth.
            for part in self._subset.up_to(self._batches_seen / sum(num_batches)):
                self._measurement.update(*self._split(to_device(trainer, pl_module, part)))
            return
        inputs, targets = self._split(batch)
        if self.max_samples is not None and self._positions is not None:
            inputs, targets, count = select(inputs, targets, self._positions)
            if not count:
                return
        self._measurement.update(inputs, targets)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measurement, self._measurement = self._measurement, None
        if measurement is None:
            return
        self.report = measurement.report()
        self._unrecorded = trainer.state.fn == "fit"
        for key, value in self._values(self.report).items():
            pl_module.log(key, torch.tensor(value, dtype=torch.float64), on_step=False, on_epoch=True)

    def _values(self, report: FlatnessReport) -> dict[str, float]:
        measures = ["hessian_trace", "relative_flatness"][: 1 if self._diagonal else 2]
        values = {measure: getattr(report, measure) for measure in measures}
        values["weight_norm"] = report.weight_norm
        main = values[measures[-1]]
        values[f"log10_{measures[-1]}"] = math.log10(main) if main > 0 else math.nan
        values |= self._by_layer(report, measures)
        return {f"{self.prefix}/{key}": value for key, value in values.items()}

    def _by_layer(self, report: FlatnessReport, measures: Sequence[str]) -> dict[str, float]:
        if len(report.layers) == 1:
            return {}
        return {
            f"{name}/{measure}": getattr(layer, measure)
            for name, layer in report.layers.items()
            for measure in measures
        }

    # ------------------------------------------------------------------------------------------------------- pictures

    def _record(self, trainer: Trainer) -> None:
        if not self._unrecorded or self.report is None or trainer.sanity_checking:
            return
        self._unrecorded = False
        values = {key.removeprefix(f"{self.prefix}/"): value for key, value in self._values(self.report).items()}
        values = {key: value for key, value in values.items() if not key.startswith("log10_")}
        self.history.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "accuracy": self._logged_accuracy(trainer),
                **values,
            }
        )
        registered: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks = [callback for callback in registered if isinstance(callback, FlatnessCallback)]
        if not any(callback._chart_laid_out for callback in callbacks):
            self._chart_laid_out = True
            tensorboard.add_joint_charts(trainer, [callback._joint_tags(trainer) for callback in callbacks])

    def _joint_tags(self, trainer: Trainer) -> list[str]:
        accuracy = self._accuracy_key(trainer)
        measure = "hessian_trace" if self._diagonal else "relative_flatness"
        return [*([accuracy] if accuracy else []), f"{self.prefix}/log10_{measure}"]

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
            tensorboard.add_figures(trainer, self.prefix, self.history, self.report, accuracy, self.data)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished measurement; keep the figures of a run that was interrupted by hand."""
        self._measurement = None
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self.on_train_end(trainer, pl_module)
        self._subset = None

    # -------------------------------------------------------------------------------------------------------- details

    def _split(self, batch: Any) -> tuple[Any, Tensor | None]:
        pair = split_batch(batch) if self.batch_fn is None else self.batch_fn(batch)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise FlatnessError(
                f"FlatnessCallback(batch_fn=...) returned a {type(pair).__name__}; it must return (inputs, targets), "
                "with None for targets that are not there."
            )
        return pair[0], pair[1]

    def _warn_no_validation(self) -> None:
        rank_zero_warn(
            "FlatnessCallback measures at validation, and this fit runs none (no validation_step, no validation data, "
            f"or limit_val_batches=0): '{self.prefix}/hessian_trace' and its kin will not be logged, and what monitors "
            "them will fail. Add validation data, or use FlatnessCallback(data='train')."
        )
