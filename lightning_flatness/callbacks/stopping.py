"""Stop training early when neither flatness nor accuracy improves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.base import MeasuringCallback
from lightning_flatness.callbacks.flatness import FlatnessCallback
from lightning_flatness.callbacks.lightning_imports import EarlyStopping, LightningModule, Trainer, callbacks_of
from lightning_flatness.callbacks.logged import logged_value
from lightning_flatness.errors import FlatnessError


@dataclass
class _Watched:
    """A metric, its best value so far, and the number of validations since its last improvement."""

    key: str
    mode: str
    min_delta: float
    relative: bool  # whether min_delta is a fraction of the best value
    wait_count: int = 0

    def __post_init__(self) -> None:
        self.best = torch.tensor(torch.inf if self.mode == "min" else -torch.inf, device="cpu")

    def update(self, value: Tensor) -> None:
        best = self.best.cpu()
        margin = self.min_delta * (abs(float(best)) if self.relative else 1.0)
        better = value < best - margin if self.mode == "min" else value > best + margin
        if not torch.isfinite(best) or bool(better):
            self.best, self.wait_count = value, 0
        else:
            self.wait_count += 1

    def __str__(self) -> str:
        return f"{self.key} (best {float(self.best):.4g})"


class FlatnessStopping(EarlyStopping):
    """Early stopping when neither flatness nor accuracy has improved for several validations after a burn-in.

    A small relative flatness means a flat network. But relative flatness rises in the first epochs, while the network
    learns to tell classes apart. A plain ``EarlyStopping`` on relative flatness takes the first epochs for the best
    ones, and stops early, at a low accuracy. ``FlatnessStopping`` ignores both metrics in the first epochs, the
    burn-in. Afterwards training continues as long as one of the metrics improves. Validations without a new flatness
    value are ignored, whether ``every_n_epochs`` skips them or the measurement fails.

    Args:
        monitor: key of a flatness measure that :class:`~lightning_flatness.FlatnessCallback` logs, or a list of keys.
            With a list, training stops only if none of these measures improves. Flatness on the training data is the
            best choice: use ``FlatnessCallback(data="train")``.
        accuracy: key of a second metric. Training stops only if the mean of this metric over the ranks does not improve
            either.
        burn_in: number of initial epochs to ignore. Choose the epochs in which the accuracy rises steeply.
        patience: training stops after this number of validations without an improvement of any metric.
        min_delta: smallest change of flatness that counts as an improvement, as a fraction of the best value.
        accuracy_min_delta: smallest absolute change of the second metric that counts as an improvement.
        mode: ``"min"`` or ``"max"``, for flatness.
        accuracy_mode: ``"min"`` or ``"max"``, for the second metric (``"min"`` for a loss).
        check_finite: after the burn-in, stop at once if a metric is NaN or infinite.
        verbose: print at every validation which metrics have improved.

    Raises:
        FlatnessError: An argument is invalid, or a metric is not logged at a validation.

    Example:
        >>> stopping = FlatnessStopping(accuracy="val_acc", burn_in=10, patience=5)
        >>> stopping.monitor
        'flatness/relative_flatness'
    """

    def __init__(
        self,
        monitor: str | Sequence[str] = "flatness/relative_flatness",
        accuracy: str = "val_acc",
        burn_in: int = 10,
        patience: int = 5,
        min_delta: float = 0.01,
        accuracy_min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        accuracy_mode: Literal["min", "max"] = "max",
        check_finite: bool = True,
        verbose: bool = False,
    ) -> None:
        if burn_in < 0 or patience < 1 or not 0 <= min_delta < 1 or accuracy_min_delta < 0:
            raise FlatnessError(
                "FlatnessStopping: burn_in and accuracy_min_delta must be at least 0, patience at least 1, and "
                f"min_delta a fraction in [0, 1); got {burn_in=}, {accuracy_min_delta=}, {patience=}, {min_delta=}."
            )
        if accuracy_mode not in ("min", "max") or mode not in ("min", "max"):
            raise FlatnessError(
                f"FlatnessStopping: mode and accuracy_mode must be 'min' or 'max'; got {mode=}, {accuracy_mode=}."
            )
        keys = [monitor] if isinstance(monitor, str) else list(monitor)
        if not keys or not all(isinstance(key, str) and key for key in [*keys, accuracy]):
            raise FlatnessError(
                "FlatnessStopping: monitor= must be the name of a logged metric or a list of names, and accuracy= a "
                "single name; got "
                f"{monitor=}, {accuracy=}."
            )
        super().__init__(
            monitor=keys[0],
            min_delta=min_delta,
            patience=patience,
            mode=mode,
            check_finite=check_finite,
            verbose=verbose,
            check_on_train_epoch_end=False,
        )
        self.min_delta = min_delta  # the base class gives min_delta the sign of the mode
        self.stopping_reason_message: str | None = None
        self.accuracy = accuracy
        self.burn_in = burn_in
        self._watched = [_Watched(key, mode, min_delta, True) for key in keys]
        self._watched.append(_Watched(accuracy, accuracy_mode, accuracy_min_delta, False))
        self._num_measured: dict[str, int] = {}

    @property
    def best_accuracy(self) -> Tensor:
        """Best value of the second metric after the burn-in."""
        return self._watched[-1].best

    @property
    def accuracy_wait_count(self) -> int:
        """Number of validations since the last improvement of the second metric."""
        return self._watched[-1].wait_count

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints. Instances with different metrics have different keys."""
        return f"FlatnessStopping[{', '.join(f'{watched.mode} {watched.key}' for watched in self._watched)}]"

    def state_dict(self) -> dict[str, Any]:
        """Return the best values and the counters of all metrics."""
        watched = {watched.key: {"best": watched.best, "wait_count": watched.wait_count} for watched in self._watched}
        return {**super().state_dict(), "watched": watched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, except for ``patience``, which this instance keeps."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        for watched in self._watched:
            state = state_dict["watched"][watched.key]
            watched.best, watched.wait_count = state["best"], state["wait_count"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training, unless the fit continues it. Refuse keys that are logged too late.

        Raise an error if the fit has validations, but a monitored key is measured only at the end of epochs.
        """
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self._watched = [replace(watched, wait_count=0) for watched in self._watched]  # with a new best value
            self.wait_count = self.stopped_epoch = 0
        for callback in self._measuring(trainer) if trainer.enable_validation else []:
            if not isinstance(callback, FlatnessCallback):
                name = type(callback).__name__
                raise FlatnessError(
                    f"FlatnessStopping checks '{callback.prefix}/...' after every validation, but {name} measures at "
                    "the end of epochs, when validations are over. Monitor a measure of a FlatnessCallback, or take "
                    "EarlyStopping(check_on_train_epoch_end=True) for this key."
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics after every validation."""
        self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics after every epoch of a fit without validation."""
        if not trainer.enable_validation:
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        is_fit = trainer.state.fn == "fit" and not (trainer.sanity_checking or getattr(trainer, "fast_dev_run", False))
        if not is_fit or not self._is_new(trainer):
            return
        metrics = trainer.callback_metrics
        logged = [logged_value(metrics, watched.key, "FlatnessStopping") for watched in self._watched]
        # Metrics may have been logged without sync_dist, so all ranks use the mean.
        values = [trainer.strategy.reduce(value, reduce_op="mean").cpu() for value in logged]
        if trainer.current_epoch < self.burn_in:
            return
        broken = [
            f"{watched.key} is {float(value)}"
            for watched, value in zip(self._watched, values, strict=True)
            if self.check_finite and not torch.isfinite(value)
        ]
        for watched, value in zip(self._watched, values, strict=True):
            if not broken:
                watched.update(value)
        self.best_score, self.wait_count = self._watched[0].best, self._watched[0].wait_count
        if self.verbose and not broken:
            states = [
                f"{watched.key} {float(value):.4g} "
                f"({'validations without improvement: ' * (not index)}{watched.wait_count})"
                for index, (watched, value) in enumerate(zip(self._watched, values, strict=True))
            ]
            rank_zero_info(f"FlatnessStopping: {', '.join(states)}")
        stalled = min(watched.wait_count for watched in self._watched) >= self.patience
        none_of = " nor ".join(str(watched) for watched in self._watched)
        reason = broken[0] if broken else f"neither {none_of} has improved for {self.patience} validations"
        # All ranks stop as soon as one rank has a reason to stop.
        stop = bool(broken) or stalled
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
            rank_zero_info(f"FlatnessStopping: stopping after epoch {trainer.current_epoch}: {reason}.")

    def _is_new(self, trainer: Trainer) -> bool:
        """Return whether the callbacks that log the monitored keys have measured since the last check."""
        numbers = {
            one.prefix: one.num_measurements if isinstance(one, FlatnessCallback) else len(one.history)
            for one in self._measuring(trainer)
        }
        if any(number == self._num_measured.get(prefix, 0) for prefix, number in numbers.items()):
            return False
        self._num_measured.update(numbers)
        return True

    def _measuring(self, trainer: Trainer) -> list[MeasuringCallback]:
        """Return the callbacks that log the monitored keys."""
        own = [callback for callback in callbacks_of(trainer) if isinstance(callback, MeasuringCallback)]
        return [one for one in own if any(watched.key.startswith(f"{one.prefix}/") for watched in self._watched)]
