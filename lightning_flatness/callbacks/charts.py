"""Charts of accuracy and flatness on TensorBoard's page Custom Scalars. Other loggers have no charts of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.callbacks.logged import accuracy_key


def add_charts_once(trainer: Trainer, callbacks: Sequence[Any]) -> None:
    """Add charts of the flatness and accuracy of callbacks, unless one of them has done so in this fit.

    Every chart has one key: TensorBoard draws all curves of a run in one colour and on one linear axis, so two
    quantities in a chart could not be told apart. It reads only one layout per run, so one layout contains the charts
    of all callbacks.
    """
    if any(callback.run_outputs.has_charts for callback in callbacks):
        return
    layout = {}
    for callback in callbacks:
        callback.run_outputs.has_charts = True
        for key in (accuracy_key(trainer.callback_metrics, callback.accuracy), callback.charted):
            if key is not None:
                layout[key] = ["Multiline", [f"^{re.escape(key)}$"]]
    for writer in _writers(trainer):
        writer.add_custom_scalars({"accuracy and flatness": layout})


def _writers(trainer: Trainer) -> list[Any]:
    """Return the ``SummaryWriter`` of every TensorBoard logger, or an empty list on ranks other than zero."""
    writers = []
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    for logger in loggers:
        with suppress(Exception):  # a logger that fails has no charts
            if hasattr(logger.experiment, "add_custom_scalars"):
                writers.append(logger.experiment)
    return writers
