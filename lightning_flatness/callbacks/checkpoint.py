"""Keep the checkpoint of the flattest network among those of nearly the best accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_flatness.callbacks.base import MeasuringCallback
from lightning_flatness.callbacks.lightning_imports import LightningModule, ModelCheckpoint, Trainer, callbacks_of
from lightning_flatness.callbacks.logged import logged_value
from lightning_flatness.checks import check_whole, is_number
from lightning_flatness.errors import FlatnessError

# Accuracies are logged in float32, so 0.90 and 0.91 may differ by a little more than 0.01.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, with the score and the flatness by which :func:`survivors` decides whether to keep it."""

    path: str
    score: float  # the accuracy, or a loss times -1, so that the largest score is the best
    flatness: float  # a small value means a flat network


def survivors(candidates: Sequence[Candidate], within: float, max_files: int) -> list[Candidate]:
    """Return the candidates that are worth keeping, from the best score to the worst. The last one is the flattest.

    A candidate is worth keeping if its score is at most ``within`` worse than the best score, and no other candidate is
    at least as good in both score and flatness. Such a candidate is the flattest of those near the best score, or may
    become the flattest when the best score rises.

    If there are more than ``max_files``, remove one candidate after another, but never the first or the last. Each
    time, remove the candidate whose flatness is nearest to that of the candidate before it.

    Example:
        >>> first, second = Candidate("1", 0.99, 5.0), Candidate("2", 0.98, 3.0)
        >>> [one.path for one in survivors([first, second], 0.02, 5)]
        ['1', '2']
        >>> [one.path for one in survivors([first, second, Candidate("3", 0.985, 2.0)], 0.02, 5)]
        ['1', '3']
    """
    best = max(candidate.score for candidate in candidates)
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (-one.score, one.flatness)):
        is_near = candidate.score >= best - within - ROUNDING * abs(best)
        if is_near and (not kept or candidate.flatness < kept[-1].flatness):
            kept.append(candidate)
    while len(kept) > max_files:
        costs = [kept[index - 1].flatness - kept[index].flatness for index in range(1, len(kept) - 1)]
        del kept[1 + costs.index(min(costs))]
    return kept


class FlatCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that keeps the flattest network among those whose accuracy is nearly the best.

    A small value of a flatness measure means a flat network. A ``ModelCheckpoint`` that monitors this value keeps a
    network of the first epochs, which is flat but has not learnt anything. A ``ModelCheckpoint`` that monitors the
    accuracy keeps the first epoch with the best accuracy. But after the accuracy has levelled off, networks become
    flatter for many epochs.

    ``best_model_path`` is the checkpoint with the smallest flatness value among all validations whose accuracy is at
    most ``within`` worse than the best accuracy so far. When the best accuracy rises, the accuracy of this checkpoint
    may be too low, and another checkpoint takes its place. So all checkpoints near the best accuracy stay on disk,
    except those that another checkpoint equals or beats in both accuracy and flatness.

    There are never more than ``max_files`` checkpoints. If there would be more, the checkpoint with the best accuracy
    and the flattest checkpoint stay. Of the other checkpoints, those that differ most in flatness stay. The final
    ``best_model_path`` may then be less flat than a checkpoint that was deleted earlier.

    The callback uses a validation only if accuracy and flatness were measured at the same step, and both are finite. So
    if flatness is measured only in every n-th epoch, the other epochs are ignored. With several ranks, the callback
    uses the means of accuracy and flatness over the ranks.

    Args:
        monitor: key of the accuracy, or of another metric such as a loss.
        within: largest accepted difference from the best accuracy; with 0, only the best accuracy is accepted.
        flatness: key of the flatness measure, e.g. one that :class:`~lightning_flatness.FlatnessCallback` logs.
        mode: ``"max"`` if a large accuracy is good, ``"min"`` for a loss.
        max_files: largest number of checkpoints on disk; at least two.
        dirpath: folder of the checkpoints. For this argument and the following ones, see Lightning's
            ``ModelCheckpoint``.
        filename: name of the files, by default ``"{epoch}-{step}"``. Files of the same name get a version number.
        verbose: print at every validation whether a checkpoint was saved.
        save_last: also keep a copy of the latest checkpoint, as ``last.ckpt``.
        save_weights_only: save the weights, and no states of optimizers and callbacks.
        auto_insert_metric_name: put the names of metrics into the file name; use False if the names contain a slash.
        every_n_epochs: number of epochs from one possible save to the next.
        save_on_train_epoch_end: save at the end of training epochs rather than after validation.

    Attributes:
        best_model_path: path of the flattest checkpoint near the best accuracy, e.g. for
            ``trainer.test(ckpt_path="best")``.
        best_model_score: accuracy of that checkpoint. ``best_flatness`` is its flatness.

    Raises:
        FlatnessError: An argument is invalid, or a metric is not logged although a validation has ended.

    Example:
        >>> checkpoint = FlatCheckpoint(monitor="val_acc", within=0.005)
        >>> checkpoint.flatness
        'flatness/relative_flatness'
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        within: float = 0.01,
        flatness: str = "flatness/relative_flatness",
        mode: Literal["max", "min"] = "max",
        max_files: int = 5,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
    ) -> None:
        if not all(isinstance(key, str) and key for key in (monitor, flatness)):
            raise FlatnessError(
                f"FlatCheckpoint: monitor= and flatness= must be names of logged metrics; got {monitor=}, {flatness=}."
            )
        if not is_number(within) or not 0 <= within < math.inf:
            raise FlatnessError(
                f"FlatCheckpoint: {within=} must be a finite number, at least 0, for monitor='{monitor}'."
            )
        if mode not in ("max", "min"):
            raise FlatnessError(f"FlatCheckpoint: mode must be 'max' or 'min' for monitor='{monitor}'; got {mode=}.")
        check_whole("FlatCheckpoint: max_files", max_files, least=2)
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
        )
        self.within = within
        self.flatness = flatness
        self.max_files = max_files
        self._candidates: list[Candidate] = []
        self._before_validation: set[str] = set()  # keys that were logged when the validation in progress began
        self._of_validation: set[str] = set()  # keys that validations log
        self._validated_at: int | None = None  # step of the latest validation of this fit; None before the first

    @property
    def best_flatness(self) -> float | None:
        """Flatness of the checkpoint at ``best_model_path``, or None if there is no checkpoint yet."""
        return self._candidates[-1].flatness if self._candidates else None

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints. It depends on the metrics, ``within`` and ``mode``."""
        return self._generate_state_key(
            monitor=self.monitor, within=self.within, flatness=self.flatness, mode=self.mode
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``ModelCheckpoint``, and the list of the checkpoints on disk."""
        candidates = [[one.path, one.score, one.flatness] for one in self._candidates]
        return {**super().state_dict(), "candidates": candidates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state. If ``dirpath`` has changed, the list of the checkpoints on disk is not restored."""
        super().load_state_dict(state_dict)
        is_same = state_dict.get("dirpath", self.dirpath) == self.dirpath
        self._candidates = [Candidate(*one) for one in state_dict["candidates"]] if is_same else []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validations of an earlier fit."""
        super().on_fit_start(trainer, pl_module)
        self._of_validation, self._validated_at = set(), None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which keys are logged already, to find out which keys the validation logs."""
        super().on_validation_start(trainer, pl_module)
        self._before_validation = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the keys and the step of the validation. Then save a checkpoint if it is due and worth keeping."""
        self._of_validation |= set(trainer.callback_metrics) - self._before_validation
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget restored checkpoints that are no longer on disk."""
        super().on_train_start(trainer, pl_module)
        self._keep([one for one in self._candidates if self.file_exists(one.path, trainer)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if no checkpoint was kept."""
        super().on_train_end(trainer, pl_module)
        if not self._candidates and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"FlatCheckpoint has kept no checkpoint, because none was due at a step where '{self.monitor}' and "
                f"'{self.flatness}' were both measured and finite. If one of them is measured less often, measure both "
                "in the same validations."
            )

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        keys = self.monitor or "", self.flatness
        is_first = trainer.enable_validation and self._validated_at is None  # no validation has logged its keys yet
        waits = is_first and any(key not in monitor_candidates for key in keys)
        if waits or not all(self._is_measured_now(trainer, key) for key in keys):
            return
        # Metrics may have been logged without sync_dist, so all ranks use the mean.
        logged = {key: logged_value(monitor_candidates, key, "FlatCheckpoint") for key in keys}
        logged = {key: trainer.strategy.reduce(value, reduce_op="mean").cpu() for key, value in logged.items()}
        score, flatness = map(float, logged.values())
        path = self._get_metric_interpolated_filepath_name(monitor_candidates | logged, trainer)
        new = Candidate(path, score if self.mode == "max" else -score, flatness)
        before, saves = self._candidates, False
        if math.isfinite(score) and math.isfinite(flatness):
            self._keep(survivors([*before, new], self.within, self.max_files))
            saves = new in self._candidates
        if self.verbose:
            what = f"{self.monitor} {score:.5g}, {self.flatness} {flatness:.5g}"
            kept = f"; the flattest is {self.best_model_path}" if self._candidates else ""
            rank_zero_info(f"FlatCheckpoint: {what}, {'saved' if saves else 'not saved'}{kept}.")
        if not saves:
            return
        self.current_score = torch.tensor(score, device="cpu")
        self._save_checkpoint(trainer, path)
        for candidate in before:
            is_dropped = candidate not in self._candidates
            if is_dropped and self._should_remove_checkpoint(trainer, candidate.path, path):
                self._remove_checkpoint(trainer, candidate.path)

    def _keep(self, candidates: list[Candidate]) -> None:
        """Store the list of checkpoints, and set the attributes that Lightning and its loggers read."""
        self._candidates = candidates
        sign = 1 if self.mode == "max" else -1
        self.best_k_models = {one.path: torch.tensor(sign * one.score, device="cpu") for one in candidates}
        if candidates:
            self.best_model_path = candidates[-1].path
            self.best_model_score = self.best_k_models[self.best_model_path]

    def _is_measured_now(self, trainer: Trainer, key: str) -> bool:
        """Return whether the logged value of ``key`` was measured at the present step.

        Lightning keeps logged values, so the value may be of an earlier step. Return True if neither a validation nor a
        callback of this package logs the key.
        """
        if key in self._of_validation and self._validated_at != trainer.global_step:
            return False
        own = [
            callback
            for callback in callbacks_of(trainer)
            if isinstance(callback, MeasuringCallback) and key.startswith(f"{callback.prefix}/")
        ]
        return all(one.history and one.history[-1]["step"] == trainer.global_step for one in own)
