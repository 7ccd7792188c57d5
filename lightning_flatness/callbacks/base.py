"""The base class of the callbacks that measure a network: arguments, history, state, figures, and joint errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_flatness.callbacks.data.sources import Asked, BatchFunction, Wanted
from lightning_flatness.callbacks.figures import RunOutputs, checked
from lightning_flatness.callbacks.labels import warn_of_mixed
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer
from lightning_flatness.callbacks.logged import logging_muted
from lightning_flatness.callbacks.monitors import warn_of_traps
from lightning_flatness.callbacks.network import (
    Network,
    Within,
    is_sought,
    named_network,
    network_in_place,
    network_without_step,
    present_network,
)
from lightning_flatness.callbacks.prefixes import UncheckedKey, check_prefix
from lightning_flatness.callbacks.rank_errors import RankErrors
from lightning_flatness.callbacks.shown import (
    check_inputs,
    network_after_unclear_step,
    refuse_late_call,
    warn_of_unseen,
)
from lightning_flatness.callbacks.step_watch import StepWatch
from lightning_flatness.callbacks.stopwatch import Stopwatch
from lightning_flatness.callbacks.watched import is_watchable
from lightning_flatness.checks import check_whole
from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.batches import as_batches
from lightning_flatness.model.call import Call
from lightning_flatness.model.whole import WholeWeights

Record = dict[str, Any]


class MeasuringCallback(Callback):
    """Base class of the callbacks that measure a network while it trains.

    A subclass gives the constructor two names. ``name`` is the name of the callback in messages and in its state key.
    ``measured`` is the name of the measured quantity in messages. The subclass documents the other arguments.
    """

    gives_way = False  # whether this callback removes itself if another callback has the same prefix
    folder: str | Path | None = None  # for files; None for a new folder within the folder of the run

    def __init__(
        self,
        name: str,
        measured: str,
        data: str | Iterable[Any],
        max_samples: int | None,
        prefix: str,
        model: Callable[[Any], Any] | str | None,
        batch_fn: BatchFunction | None,
        figures: bool | Literal["auto", "files"],
        figures_every: int | None,
        on_error: Literal["raise", "warn"],
    ) -> None:
        can_be_read_again = isinstance(data, Iterable) and not isinstance(data, Iterator)
        if data not in ("val", "train") if isinstance(data, str) else not can_be_read_again:
            raise FlatnessError(
                f"{name}: data must be 'val', 'train', a DataLoader or a list of batches, not {data!r}."
            )
        if on_error not in ("raise", "warn"):
            raise FlatnessError(f"{name}: on_error must be 'raise' or 'warn', not {on_error!r}.")
        if not prefix or not isinstance(prefix, str):
            raise FlatnessError(f"{name}: prefix={prefix!r} must be a non-empty string.")
        check_whole(f"{name}: max_samples", max_samples, least=1, or_none=True)
        check_whole(f"{name}: figures_every", figures_every, least=1, or_none=True)
        self.data = data if isinstance(data, str) or batch_fn else as_batches(data, f"{name}: data")
        self.max_samples = max_samples
        self.prefix = prefix
        self.model = model
        self.batch_fn = batch_fn
        self.figures = checked(figures, name)
        self.figures_every = figures_every
        self.history: list[Record] = []
        self._name = name
        self._errors = RankErrors(on_error, name, measured)
        self.run_outputs = RunOutputs(name, prefix, self.figures)
        self._num_drawn = 0  # number of records when the latest figures were drawn
        self._num_restored = 0  # number of records that a checkpoint has restored in this run
        self._logged_step = 0  # number of the step, in loggers, of the latest measurement
        self._stopwatch = Stopwatch()  # for the measurement in progress
        self._fitted_by: int | None = None  # the id of the latest Trainer that has fitted
        self._stage: str | None = None
        self._is_checked = False  # whether it is known that no other callback has this prefix
        self._is_restored = False
        self._network: Network | None = None  # the network that the latest watched validation step has shown
        self._was_unseen = False  # whether batches were measured whose steps were not seen to call a network
        self._asked: Asked | None = None  # inputs and targets of the batch that is being validated
        self._watch: StepWatch | None = None  # records the calls in the validation step of that batch
        self._whole: WholeWeights | None = None  # during a measurement: the gathered weights; empty without FSDP2

    @abstractmethod
    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to measure now. All ranks must return the same. Override this method for another schedule."""

    def _release(self) -> None:
        """Drop the data and the model of a measurement in progress, and the pending error."""
        self._errors.pending = None
        self._stop_watching()
        self._network = self._whole = None
        self._was_unseen = False

    @abstractmethod
    def _draw_run(self, trainer: Trainer) -> None:
        """Draw the figures of the whole run. The callback calls this method when the run ends or is interrupted."""

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints. Callbacks with different prefixes have different keys."""
        key = f"{self._name}[prefix={self.prefix}]"
        return key if self._is_checked else UncheckedKey(key)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain numbers, strings and lists."""
        self._is_checked = True  # Lightning writes the state key to a checkpoint next, as a plain string
        return {"history": [dict(record) for record in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history from a checkpoint, unless Lightning loads the checkpoint to validate or test."""
        if self._stage in (None, "fit"):
            self.history = [dict(record) for record in state_dict["history"]]
            self._is_restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise an error if another callback has the same prefix. Store the stage for :meth:`load_state_dict`."""
        check_prefix(trainer, self)
        self._is_checked = True
        self._stage = stage

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the data and the model."""
        self._stage = None
        self._release()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history unless the fit continues an earlier one. Check that ``model=`` names a network."""
        if not self._is_restored and not (trainer.global_step and self._fitted_by == id(trainer)):
            self.history = []
        if not self.history:
            warn_of_traps(trainer, self.prefix, self._errors.on_error)
        self._is_restored, self._fitted_by = False, id(trainer)
        self._release()
        self._errors.start_run()
        self.run_outputs = RunOutputs(self._name, self.prefix, self.figures, self.folder)
        self._num_drawn = self._num_restored = len(self.history)
        with self._measuring(trainer, pl_module):
            named_network(pl_module, self.model)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record the calls in validation steps until one calls the network, or again if it has been replaced."""
        if self._errors.pending:
            return
        before = None if batch_idx == 0 and is_sought(self._network) else self._network
        self._network = before  # every validation of a loader is judged by its own steps
        if before is not None:
            with self._errors.kept(trainer.world_size):  # and no _measuring, which costs time in every validation
                now = present_network(before, pl_module, self.model)
                self._network = now if before is now or not before.is_called else None
        if is_sought(self._network) and not self._errors.pending:
            with self._measuring(trainer, pl_module):
                self._start_watching(pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Find the network among the modules that the validation step has called."""
        if self._asked is not None and not self._errors.pending:
            with self._measuring(trainer, pl_module):
                self._find_network(pl_module)
        self._stop_watching()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def _append(self, record: Record) -> None:
        """Add a record to the history. Warn if its numbers cannot be compared with those of the record before it."""
        if self.history:
            resumed = len(self.history) == self._num_restored
            warn_of_mixed(self._name, self.prefix, record, self.history[-1], resumed)
        self.history.append(record)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """In a fit without validation, record the calls of modules in training steps until the network is known."""
        needs_step = self._data_name != "val" and not trainer.enable_validation
        if needs_step and self._network is None and not self._errors.pending:
            with self._measuring(trainer, pl_module), self._training_step(pl_module):
                self._start_watching(pl_module, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop recording, because a backward pass may call modules again (gradient checkpointing)."""
        if self._watch is not None:
            self._watch.__exit__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find the network among the modules that the training step has called."""
        if self._asked is not None and not self._errors.pending:
            with self._measuring(trainer, pl_module), self._training_step(pl_module):
                self._find_network(pl_module)
        self._stop_watching()

    @contextmanager
    def _training_step(self, pl_module: LightningModule) -> Iterator[None]:
        """Turn an error of the ``with`` block into a warning, if a network to measure can be found all the same."""
        try:
            yield
        except Exception as error:
            self._stop_watching()
            given = (self._name, pl_module, self.model)
            self._network = network_after_unclear_step(*given, self._network, error)

    def _start_watching(self, pl_module: LightningModule, batch: Any) -> Asked:
        self._stop_watching()  # an earlier step may have raised an error
        copies = not self._follows_steps or (self._was_unseen and is_sought(self._network))  # to compare a late call
        self._asked = self._wanted.before_step(batch, pl_module, copies, self._wanted.measures(pl_module.trainer))
        if is_sought(self._network) and is_watchable(pl_module):
            step = "training" if pl_module.trainer.training else "validation"
            self._watch = StepWatch(pl_module, named_network(pl_module, self.model), step).__enter__()
        return self._asked

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.__exit__()
        self._watch = self._asked = None

    def _find_network(self, pl_module: LightningModule) -> Call | None:
        """Find the network among the modules that the step has called, and return the call to measure.

        Return None if no recorded call can be measured. If no call was recorded at all, the network stays unknown for
        now in the sanity check, in training and with an empty batch. In other steps, warn, and measure the batch's own
        inputs (see :func:`refuse_late_call`).

        If :attr:`_follows_steps` is True and ``batch_fn=`` gives no inputs, the inputs of the returned call are
        measured. Otherwise compare the inputs with those that the step gives to the network (:func:`check_inputs`).
        """
        watch, asked = self._watch, self._asked
        assert asked is not None
        if watch is not None:
            watch.__exit__()
        if watch is None or watch.is_empty:
            watched, trainer = watch is not None and not watch.is_compiled, pl_module.trainer
            if self._network or (watched and (asked.is_empty or trainer.sanity_checking or trainer.training)):
                return None  # a later step will tell
            self._network = network_without_step(pl_module, self.model, is_sought=watched and not asked.is_given)
            if not asked.is_given and not self._was_unseen:
                warn_of_unseen(self._name, watched)
            self._was_unseen = True
            return None
        found = watch.found(asked.inputs, asked.is_given)
        if self._was_unseen and self._follows_steps:
            refuse_late_call(self._name, asked, found.call, within=self._network is not None)
        self._network = found.network
        if found.call is not None:
            asked.refuse_doubtful(found.call)
        if found.call is None or asked.inputs is None or (self._follows_steps and not asked.is_given):
            return found.call
        check_inputs(self._name, self.data, watch.step, asked, found.call, self._follows_steps)
        return found.call

    def _gather(self, pl_module: LightningModule) -> None:
        """Gather the weights that FSDP2 has sharded.

        This is a collective, so ranks that have failed must call this method, too.
        """
        self._whole = WholeWeights(pl_module)

    def _whole_copy(self, network: nn.Module) -> nn.Module:
        """Return a copy of the network with the gathered weights, or the network itself if no weights are sharded."""
        return self._whole.copy_of(network) if self._whole else network

    def _model_of(self, pl_module: LightningModule) -> nn.Module:
        """Return the network. Its parameters are named as in the LightningModule, unless the user gives ``model=``."""
        network = self._network_of(pl_module)
        return Within(network.module, network.prefix) if network.prefix else network.module

    def _network_of(self, pl_module: LightningModule) -> Network:
        """Return the network with its present module, because the module may have been replaced."""
        return network_in_place(self._network, pl_module, self.model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of the run."""
        self._draw_run(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished measurement. If Ctrl-C has interrupted a fit, draw the figures of the fit."""
        self._release()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._draw_run(trainer)

    @contextmanager
    def _measuring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Run a ``with`` block that is a part of a measurement.

        Calls of ``log`` in the network have no effect, the stopwatch runs, and errors wait (:meth:`RankErrors.kept`).
        """
        clock = self._stopwatch.running(pl_module.device)
        with self._errors.kept(trainer.world_size), logging_muted(pl_module), clock:
            yield

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.data, self.max_samples, self.batch_fn)

    @property
    def _data_name(self) -> str:
        return self.data if isinstance(self.data, str) else "given"

    @property
    def _follows_steps(self) -> bool:
        """Whether the callback measures the validated batches, with the inputs that their steps give the network."""
        return self._data_name == "val"

    @property
    def _draws_now(self) -> bool:
        """Whether ``figures_every`` asks for figures after the latest measurement."""
        return self.figures_every is not None and len(self.history) % self.figures_every == 0

    @property
    def _is_drawn(self) -> bool:
        """Whether figures of the latest measurement have been drawn. True if there is no measurement."""
        return len(self.history) <= self._num_drawn

    def _draw(self, trainer: Trainer, draw: Callable[[], Mapping[str, Any]], suffix: str = "") -> None:
        """Give the figures of the latest measurement to the loggers. ``draw`` returns a dict from tags to figures."""
        self._num_drawn = len(self.history)
        self.run_outputs.add_figures(trainer, draw, self.history[-1], self._logged_step, suffix)
