"""The callback that measures the flatness of a network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_flatness.callbacks import labels, logged
from lightning_flatness.callbacks.averaging import warn_of_initial_weights
from lightning_flatness.callbacks.data.loaders import flat_loaders, validated_loaders
from lightning_flatness.callbacks.data.sources import Samples, first_samples, sources_of
from lightning_flatness.callbacks.flatness_history import FlatnessHistory
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, callbacks_of
from lightning_flatness.callbacks.network import Network, is_sought
from lightning_flatness.callbacks.running import PassesOfRun
from lightning_flatness.callbacks.stopwatch import Stopwatch, in_words
from lightning_flatness.callbacks.validation import Validation, settle
from lightning_flatness.checks import check_whole
from lightning_flatness.errors import LayerSelectionError, NotExactError, UnbuiltError
from lightning_flatness.layers.options import MEASURES, Options
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.ranks import gather
from lightning_flatness.model.answer import certify_weights
from lightning_flatness.results import LayerInfo


class FlatnessCallback(FlatnessHistory):
    """A callback that logs the Hessian trace and relative flatness of layers at every validation.

    It measures convolutions and linear layers. ``ModelCheckpoint``, schedulers and
    :class:`~lightning_flatness.FlatnessStopping` can monitor the values that it logs:

    - ``{prefix}/hessian_trace``: the Hessian trace, summed over the measured layers, in loss per squared weight;
    - ``{prefix}/relative_flatness``: relative flatness, summed over the measured layers, in units of the loss;
    - ``{prefix}/log10_relative_flatness``: the base-10 logarithm of that sum, for charts; NaN if it is not positive;
    - ``{prefix}/normalized_relative_flatness``: a variant that stays the same when input channels are rescaled;
    - ``{prefix}/relative_flatness_error`` and so on: standard errors of these sums, due to the choice of samples;
    - ``{prefix}/weight_norm``: the norm of the measured kernels, for comparison;
    - ``{prefix}/loss``: the mean loss of the measured samples;
    - ``{prefix}/top1``: the share of the measured samples that the network classifies correctly;
    - ``{prefix}/curvature``: the mean trace of the loss's second derivative with respect to the logits;
    - ``{prefix}/exact``: 1 if all numbers are exactly those of the Hessian, otherwise 0;
    - ``{prefix}/seconds``: the time that measuring took, on the slowest rank;
    - ``{prefix}/{layer}/relative_flatness`` and so on: the same for each layer, if several are measured;
    - ``{prefix}/.../dataloader_idx_1`` and so on: the same for further validation loaders.

    Training with this callback is bit-identical to training without it, with few exceptions: ``docs/limits.md``,
    "Random numbers and side effects".

    Args:
        layers: the layers to measure. :func:`~lightning_flatness.measure_flatness` explains this argument and those
            from ``strict`` to ``dtype``.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``; a loss module of torch with
            ``reduction="mean"``; or a function or module that returns per-sample losses.
        data: ``"val"`` for the validated batches; ``"train"`` for a fixed random subset of the training data, which a
            separate loader reads; or your own ``DataLoader`` or list of batches, of which every rank measures a part.
            The network is in evaluation mode. The papers define flatness on the training loss.
        every_n_epochs: number of epochs from one measurement to the next. The first validation is always measured.
        max_samples: number of samples of a fixed random subset, over all ranks. The subset is stratified by class if
            the data set has ``targets`` or ``labels``. The default is all samples, or 4,096 of the training data.
            If the training ``DataLoader`` or your own has ``batch_size=None``, this is a number of batches.
        prefix: prefix of the logged keys. Several callbacks in one Trainer need different prefixes.
        accuracy: key of the logged accuracy to plot with flatness; by default the first logged key that contains
            ``acc`` and ``val``, or else the first that contains ``acc``.
        model: name of the LightningModule's attribute that is the network, e.g. ``"net"``, or a function that takes the
            LightningModule and returns the network; by default the network that the validation step calls.
        batch_fn: function that takes a batch and returns ``(inputs, targets)``. By default, the inputs are those that
            the step gives the network. The targets are a pair's second entry, or an entry with a name like ``label``.
        summary: print before training which layers are measured and how, and which are left out and why.
        figures: ``"auto"`` to give figures of accuracy, flatness and block traces to every logger that takes figures,
            and to write PNG files for the other loggers; ``"files"`` for PNG files only; False for none. See
            ``docs/loggers.md``.
        figures_every: draw after every n-th measurement, too; by default only at the end of training.
        strict: raise an error if a value is not exactly that of the Hessian.
        label_smoothing: label smoothing of the cross-entropy.
        class_weight: class weights of the cross-entropy.
        ignore_index: target value that the cross-entropy ignores.
        measures: the measures to compute. With ``["hessian_trace"]`` no kind of relative flatness is logged.
        tolerance: accepted relative standard error of estimates. Numbers are estimated if there are many classes.
        residual: ``"hutchinson"`` to estimate the part of the Hessian that the Gauss-Newton matrix omits.
        num_probes: number of random probe vectors of the Hutchinson estimate.
        seed: seed of the random probe vectors.
        dtype: ``"float32"`` or ``"float64"`` for the computation; by default the model's own, at least float32.
        live: measure in validation's own forward passes if a trial shows that this changes nothing; else in extra ones.
        on_error: ``"raise"``, or ``"warn"`` to train on and log NaN. ``EarlyStopping`` needs ``check_finite=False``.

    Attributes:
        history: one record for every measurement of a fit, saved in checkpoints. A record is a dict. It has the numbers
            above (None if unknown) without the logarithm, and standard errors ``..._error`` of all measures. ``data``,
            ``num_samples``, ``layers``, ``loss_name``, ``method`` and ``precision`` say what was measured, and how.
            ``accuracy`` is the value that the LightningModule has logged.
        report: the last measurement, a :class:`~lightning_flatness.FlatnessReport`. If the strategy spawns processes,
            only these have the report and the history. The main process has only the logged values.
        reports: a dict from the index of every validation loader to the last report of this loader.
        num_measurements: number of measurements, including those in validation and test runs.

    Raises:
        FlatnessError: An argument is invalid, or the network or data cannot be measured (checked before training).

    Source:
        Taleghani et al. 2026 (arXiv 2603.09016); Petzka et al. 2021 (arXiv 2001.00939), Definition 3.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FlatnessCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "last",
        # Function types come first, since a command line uses the first type that fits.
        loss: Callable[[Tensor, Tensor], Tensor] | nn.Module | str = "cross_entropy",
        data: Literal["val", "train"] | Iterable[Any] = "val",
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        prefix: str = "flatness",
        accuracy: str | None = None,
        model: Callable[[Any], Any] | str | None = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor | None]] | None = None,
        summary: bool = True,
        figures: bool | Literal["auto", "files"] = "auto",
        figures_every: int | None = None,
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
        checked = Options(**self._options)
        # Whether samples wait in memory until all ranks know the standard deviations of the layers' input channels.
        self._waits = checked.is_normalized
        self._measures = ["hessian_trace"] if checked.diagonal else ["hessian_trace", "relative_flatness"]
        shared = (data, max_samples, prefix, model, batch_fn, figures, figures_every, on_error)
        super().__init__(accuracy, self._measures[-1], "FlatnessCallback", "flatness", *shared)
        check_whole("FlatnessCallback: every_n_epochs", every_n_epochs, least=1)
        self.every_n_epochs = every_n_epochs
        self.summary = summary
        self.num_measurements = 0
        self._wants_live = live
        self._passes = PassesOfRun(live)
        # How each layer is measured, and why other layers are left out. Both are found before training.
        self._certified: tuple[Mapping[str, LayerInfo], Mapping[str, str]] | None = None
        self._running: Validation | None = None
        self._num_sources = 1  # number of sources of the validation in progress
        self._told_inexact: frozenset[tuple[int, str]] = frozenset()  # loaders and layers that a warning has named

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to measure in the validation that begins.

        In a fit without validation, return whether to measure after this epoch. Override this method for another
        schedule, which must be the same on all ranks.
        """
        if trainer.state.fn != "fit" or not self.history:
            return True
        passed: int = trainer.current_epoch - self.history[-1]["epoch"]
        return passed == 0 or passed >= self.every_n_epochs  # all validations of a measured epoch are measured

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history. Raise an error, or warn, if a problem can be found before training."""
        self._certified = None
        self._told_inexact = frozenset()
        super().on_fit_start(trainer, pl_module)
        if self._data_name == "val" and not trainer.enable_validation:
            logged.warn_no_validation(self.prefix)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how each layer can be measured, if the sanity check has not done so. Then print a summary."""
        expects = self._data_name == "val" and trainer.enable_validation
        if expects and flat_loaders(trainer.val_dataloaders) and not sum(trainer.num_val_batches):
            logged.warn_no_validation(self.prefix)
        self._gather(pl_module)
        with self._measuring(trainer, pl_module):
            if not self._certified:
                self._certify_early(trainer, pl_module)
        self._whole = None
        if not self._errors.settle("the start of training") or not self._certified:
            return
        self._told_inexact = labels.warn_of_inexact({0: self._certified[0].values()}, self._told_inexact, self.prefix)
        if self.summary and trainer.is_global_zero:
            labels.print_summary(*self._certified, self._data_name, self.prefix)

    def _certify_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check how each layer can be measured, unless something is missing that the first step will bring."""
        waits = self._network is None and (self._data_name == "val" or not trainer.enable_validation)
        try:
            samples = first_samples(trainer, pl_module, self._wanted)
            if samples is not None and not self._errors.pending:
                self._certify(self._network_of(pl_module), samples)
        except Exception as error:
            refused = isinstance(error, (LayerSelectionError, NotExactError)) or not waits
            if refused and not isinstance(error, UnbuiltError):
                raise

    def _certify(self, network: Network, samples: Samples) -> None:
        measurement = self._new_measurement(network)
        measurement.certify(*samples, live=self._passes.possible and self._data_name == "val")
        self._certified = (measurement.layers, measurement.observer.left_out) if measurement.layers else None

    def _new_measurement(self, network: Network) -> Measurement:
        if self._whole:
            self._passes.rule_out("FSDP2 shards the weights, so every rank measures a copy with all weights")
        return Measurement(self._whole_copy(network.module), sync=True, prefix=network.prefix, **self._options)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a measurement, if one is due."""
        if trainer.sanity_checking:
            self._gather(pl_module)
        else:
            self._start(trainer, pl_module, *validated_loaders(trainer))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start to record the network's inputs in this step and, if possible, the network's forward pass."""
        if self._running is not None or self._network is None:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        network, follows = self._network, self._data_name == "val" and not self._errors.pending
        if self._running is not None and network is not None and follows:
            with self._measuring(trainer, pl_module):
                asked = self._asked or self._start_watching(pl_module, batch)
                self._running.before_step(asked, network, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the validated batch, or the next part of the training data or of the user's own data.

        Do not wait for the end of the validation epoch: there, Lightning's ``WeightAveraging`` puts the weights of the
        training back. In a sanity check, only find out how each layer can be measured.
        """
        if (self._running or self._asked) and not self._errors.pending:
            with self._measuring(trainer, pl_module):
                asked, is_watched = self._asked, is_sought(self._network)
                call = self._find_network(pl_module) if asked is not None and is_watched else None
                certify_weights(call)
                network = self._network  # None if no step has called it yet
                if self._running is not None and network is not None:
                    self._running.after_step(asked, call, network, batch_idx, dataloader_idx)
                elif self._data_name == "val" and self._certified is None and asked is not None and network:
                    with asked.explaining():
                        self._certify(network, asked.samples(call or asked.own_call()))
        if self._running is not None:
            network, failed = self._network or Network(pl_module), self._errors.pending is not None
            self._running.end_step(network, batch, batch_idx, dataloader_idx, failed)
        self._stop_watching()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values. Callbacks and schedulers that monitor a key read it later in the same epoch."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a fit without validation, measure the training data or the user's own; add the module's accuracy later."""
        if self._data_name != "val" and not trainer.enable_validation:
            self._start(trainer, pl_module, None, [])
            self._finish(trainer, pl_module)
            self._add_to_history(trainer)

    def _start(self, trainer: Trainer, pl_module: LightningModule, loaders: Any, num_batches: Sequence[float]) -> None:
        self._running = self._awaits_accuracy = None
        self._stopwatch = Stopwatch()
        if not self.is_due(trainer):
            return
        warn_of_initial_weights(trainer, self._name)
        if self._data_name == "train" and trainer.state.fn != "fit":
            logged.warn_outside_of_fit()
            return
        self._gather(pl_module)
        self._num_sources = max(1, len(num_batches)) if self._data_name == "val" else 1
        with self._measuring(trainer, pl_module):
            sources = sources_of(trainer, pl_module, self._wanted, loaders, num_batches)
            self._running = Validation(sources, self._passes, self._new_measurement, self._waits)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        running, self._running = self._running, None
        if running is None and not self._errors.pending:  # no measurement was due
            if trainer.state.fn == "fit" and self.history:
                logged.log_again(trainer, pl_module, self.prefix, self.history, self._charted_measure)
            return
        with self._measuring(trainer, pl_module):
            # Validated batches are all measured by now. A rank without a batch does not know the network.
            if running is not None and self._data_name != "val" and not self._errors.pending:
                running.measure_rest(self._network_of(pl_module))
        with self._measuring(trainer, pl_module):
            network = self._network or Network(pl_module)
            settle(running, network, self._num_sources, self._waits, failed=self._errors.pending is not None)
        self._whole = None
        if not self._is_settled(trainer, pl_module) or running is None:
            return
        with self._measuring(trainer, pl_module):
            reports = running.reports(self._network or Network(pl_module))
        if not self._is_settled(trainer, pl_module):
            return
        seconds = max(gather(self._stopwatch.seconds(), sync=True))
        self.reports = labels.with_data(reports, self._data_name, trainer.testing, seconds)
        self.report = self.reports[0]
        self.num_measurements += 1
        if self.num_measurements == 1 and (trainer.enable_validation or trainer.state.fn != "fit"):
            samples = [report.num_samples for report in self.reports.values()]
            clocks = [one._stopwatch for one in callbacks_of(trainer) if isinstance(one, FlatnessCallback)]
            rank_zero_info(f"FlatnessCallback: {in_words(seconds, self._stopwatch.rest(clocks), samples)}.")
        infos = {loader: [layer.info for layer in report.layers.values()] for loader, report in self.reports.items()}
        self._told_inexact = labels.warn_of_inexact(infos, self._told_inexact, self.prefix)
        values = labels.values_of_loaders(self.reports, self._measures)
        record = logged.record_of(trainer, values | {"seconds": seconds})
        logged.log(pl_module, self.prefix, logged.logged_values(record, self.history, self._charted_measure))
        logged.tell_of_loaders(trainer, self.prefix, self._charted_measure, self.reports)
        self._awaits_accuracy = record if trainer.state.fn == "fit" else None

    def _release(self) -> None:
        super()._release()
        if self._running is not None:
            self._running.release()
        self._running = None
        self._passes = PassesOfRun(self._wants_live)
