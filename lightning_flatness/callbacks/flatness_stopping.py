"""Early stopping on flatness that does not stop at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.root import EarlyStopping, LightningModule, Trainer
from lightning_flatness.errors import FlatnessError


class FlatnessStopping(EarlyStopping):
    """Stop when neither flatness nor accuracy has improved for some validations, after a burn-in.

    Relative flatness rises from initialisation, while the network begins to tell classes apart at all. A plain
    ``EarlyStopping`` on it takes the first epochs for the best and stops after a few, at a fraction of the accuracy.
    This one ignores both during the burn-in, and then waits until *both* have stalled: as long as one of them gets
    better, training goes on.

    Args:
        monitor: flatness, a key that :class:`~lightning_flatness.FlatnessCallback` logs. Best measured on the training
            data, ``FlatnessCallback(data="train")``.
        accuracy: a second monitored metric, which must have stalled as well.
        burn_in: epochs at the start that do not count. About as many as the accuracy needs for its steep rise.
        patience: validations without an improvement of either, after which to stop.
        min_delta: what counts as an improvement of flatness, as a fraction of the best value (its scale is not known
            beforehand).
        accuracy_min_delta: what counts as an improvement of accuracy, absolute.
        mode: ``"min"`` or ``"max"``, for flatness.
        accuracy_mode: ``"min"`` or ``"max"``, for the second metric (``"min"`` for a loss).
        check_finite: after the burn-in, stop at once when either is NaN or infinite.
        verbose: say every time which of the two improved.

    Raises:
        FlatnessError: wrong arguments; or, at a validation, a metric that nobody logs.

    Example:
        >>> stopping = FlatnessStopping(accuracy="val_acc", burn_in=10, patience=5)
        >>> stopping.monitor
        'flatness/relative_flatness'
    """

    def __init__(
        self,
        monitor: str = "flatness/relative_flatness",
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
            raise FlatnessError(f"FlatnessStopping: modes are 'min' or 'max'; got {mode=}, {accuracy_mode=}.")
        super().__init__(
            monitor=monitor,
            min_delta=min_delta,
            patience=patience,
            mode=mode,
            check_finite=check_finite,
            verbose=verbose,
            check_on_train_epoch_end=False,
        )
        self.min_delta = min_delta  # the base class keeps it with the sign of the mode
        self.stopping_reason_message: str | None = None
        self.accuracy = accuracy
        self.burn_in = burn_in
        self.accuracy_min_delta = accuracy_min_delta
        self.accuracy_mode = accuracy_mode
        self.accuracy_wait_count = 0
        self.best_accuracy = torch.tensor(torch.inf if accuracy_mode == "min" else -torch.inf)

    @property
    def state_key(self) -> str:
        """Tells several instances apart in a checkpoint."""
        return f"FlatnessStopping[{self.mode} {self.monitor}, {self.accuracy_mode} {self.accuracy}]"

    def state_dict(self) -> dict[str, Any]:
        """Counters and best values, as plain types."""
        own = {"accuracy_wait_count": self.accuracy_wait_count, "best_accuracy": self.best_accuracy}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint left off; the patience is the one given now."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        self.accuracy_wait_count = state_dict["accuracy_wait_count"]
        self.best_accuracy = state_dict["best_accuracy"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at both metrics after every validation."""
        self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation, look at both metrics after every epoch."""
        if not trainer.enable_validation:
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        flatness, accuracy = (self._logged(trainer.callback_metrics, key) for key in (self.monitor, self.accuracy))
        if trainer.current_epoch < self.burn_in:
            return
        if self.check_finite:
            for key, value in ((self.monitor, flatness), (self.accuracy, accuracy)):
                if not torch.isfinite(value):
                    self._stop(trainer, f"{key} is {float(value)}", stop=True)
                    return

        flatter = _better(flatness, self.best_score, self.mode, self.min_delta * abs(float(self.best_score)))
        sharper_eyed = _better(accuracy, self.best_accuracy, self.accuracy_mode, self.accuracy_min_delta)
        self.wait_count = 0 if flatter else self.wait_count + 1
        self.accuracy_wait_count = 0 if sharper_eyed else self.accuracy_wait_count + 1
        self.best_score = flatness if flatter else self.best_score
        self.best_accuracy = accuracy if sharper_eyed else self.best_accuracy
        if self.verbose:
            rank_zero_info(
                f"FlatnessStopping: {self.monitor} {float(flatness):.4g} (no improvement for {self.wait_count}), "
                f"{self.accuracy} {float(accuracy):.4g} (for {self.accuracy_wait_count})"
            )
        stalled = min(self.wait_count, self.accuracy_wait_count) >= self.patience
        self._stop(
            trainer,
            f"neither {self.monitor} (best {float(self.best_score):.4g}) nor {self.accuracy} (best "
            f"{float(self.best_accuracy):.4g}) has improved for {self.patience} validations",
            stop=stalled,
        )

    def _logged(self, metrics: Mapping[str, Tensor], key: str) -> Tensor:
        if key not in metrics:
            raise FlatnessError(
                f"FlatnessStopping watches '{key}', which is not logged; there are: "
                f"{', '.join(sorted(metrics)) or 'none'}. Flatness needs a FlatnessCallback in the Trainer; accuracy "
                "a self.log in validation_step."
            )
        return metrics[key].detach().cpu()

    def _stop(self, trainer: Trainer, reason: str, *, stop: bool) -> None:
        # All ranks stop as soon as one wants to.
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
            rank_zero_info(f"FlatnessStopping: stopping after epoch {trainer.current_epoch}: {reason}.")


def _better(value: Tensor, best: Tensor, mode: str, margin: float) -> bool:
    if not torch.isfinite(best):
        return True
    return bool(value < best.cpu() - margin) if mode == "min" else bool(value > best.cpu() + margin)
