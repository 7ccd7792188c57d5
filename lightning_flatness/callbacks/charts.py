"""Define charts of accuracy and flatness for TensorBoard's page Custom Scalars. Other loggers get no charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.callbacks.logged import accuracy_key


def add_charts_once(trainer: Trainer, callbacks: Sequence[Any]) -> None:
    """Add a chart of flatness and a chart of accuracy for each callback, unless this was done before in this fit.

    Every chart shows only one key, because TensorBoard would draw two keys in the same colour and on the same linear
    axis. The charts of all callbacks are in one layout, because TensorBoard reads only one layout per run.
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
        with suppress(Exception):  # a logger that raises an error gets no charts
            if hasattr(logger.experiment, "add_custom_scalars"):
                writers.append(logger.experiment)
    return writers
