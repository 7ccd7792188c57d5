"""Charts and figures for TensorBoard. Other loggers get none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.lightning_imports import ROOTS, Trainer
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots import plot_block_traces, plot_history, plot_layer_history, plot_layers
from lightning_flatness.results import FlatnessReport

# The user can draw the block traces of further layers with plot_block_traces.
MOST_HEAT_MAPS = 8


def writers(trainer: Trainer) -> list[Any]:
    """Return the ``SummaryWriter`` of every TensorBoard logger, or an empty list on ranks other than zero."""
    if not trainer.is_global_zero:
        return []
    loaded = [sys.modules[f"{root}.loggers"] for root in ROOTS if f"{root}.loggers" in sys.modules]
    kinds = tuple(module.TensorBoardLogger for module in loaded)
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, kinds)]


def add_charts(trainer: Trainer, tags: Sequence[str], accuracies: Sequence[str | None]) -> None:
    """Add charts of accuracy and of flatness to TensorBoard's page Custom Scalars, side by side.

    ``tags`` and ``accuracies`` contain the key of flatness and the key of accuracy, if any, of every callback. Every
    chart has one key: TensorBoard draws all curves of a run in one colour and on one linear axis, so two quantities in
    a chart could not be told apart. It reads only one layout per run, so one layout contains the charts of all
    callbacks.
    """
    layout = {}
    for tag, accuracy in zip(tags, accuracies, strict=True):
        for key in (accuracy, tag):
            if key is not None:
                layout[key] = ["Multiline", [f"^{re.escape(key)}$"]]
    for writer in writers(trainer):
        writer.add_custom_scalars({"accuracy and flatness": layout})


def stopping_of(trainer: Trainer) -> dict[str, Any]:
    """Return the burn-in of the run's stopping rule, if it has one, and the epoch after which it stopped the run."""
    rules: list[Any] = list(trainer.early_stopping_callbacks)
    burn_ins = [rule.burn_in for rule in rules if getattr(rule, "burn_in", 0)]
    stops = [rule.stopped_epoch for rule in rules if rule.stopped_epoch]
    return {"burn_in": max(burn_ins, default=None), "stopped": max(stops, default=None)}


def flatness_figures(
    history: Sequence[Mapping[str, Any]],
    report: FlatnessReport,
    accuracy: str | None,
    data: str,
    stopping: Mapping[str, Any],
) -> dict[str, Any]:
    """Draw the history, a comparison of layers and heat maps of block traces, as a dict from tags to figures."""
    shared: dict[str, Any] = {"report": report, "data": data}
    figures = {"history": plot_history(history, accuracy_label=accuracy or "accuracy", **shared, **stopping)[0]}
    measure = "relative_flatness" if "relative_flatness" in history[-1] else "hessian_trace"
    if len(report.layers) > 1:
        figures["layers"] = plot_layers(report, measure, data=data)[0]
        figures["layer_history"] = plot_layer_history(history, measure, **shared)[0]
    whole = {name: layer for name, layer in report.layers.items() if layer.block_traces.ndim == 3}
    for name, layer in list(whole.items())[:MOST_HEAT_MAPS]:
        figures[f"block_traces/{name}"] = plot_block_traces(layer, data=data)[0]
    return figures


def add_drawn(trainer: Trainer, prefix: str, draw: Callable[[], Mapping[str, Any]], callback: str) -> None:
    """Draw figures and add them to TensorBoard's page Images, if there is a TensorBoard logger."""
    if not writers(trainer):
        return
    try:
        figures = draw()
    except FlatnessError as error:
        rank_zero_warn(f"{callback} draws no figures: {error}")
        return
    for writer in writers(trainer):
        for tag, figure in figures.items():
            writer.add_figure(f"{prefix}/{tag}", figure, global_step=last_step(trainer))


def last_step(trainer: Trainer) -> int:
    """Return the step number under which Lightning logs scalars of the last optimizer step."""
    return max(0, trainer.global_step - 1)
