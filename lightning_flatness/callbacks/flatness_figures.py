"""Draw the figures of the FlatnessCallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.callbacks.logged import accuracy_key
from lightning_flatness.plots import plot_block_traces, plot_history, plot_layer_history, plot_layers
from lightning_flatness.results import FlatnessReport

# Largest number of layers with a heat map. The user can draw further heat maps with plot_block_traces.
MOST_HEAT_MAPS = 8


def stopping_of(trainer: Trainer) -> dict[str, Any]:
    """Return the ``burn_in`` of early stopping, and the epoch after which early stopping ``stopped`` the run.

    The burn-in is the number of initial epochs that early stopping ignores. Both values may be None.
    """
    rules: list[Any] = list(trainer.early_stopping_callbacks)
    burn_ins = [rule.burn_in for rule in rules if getattr(rule, "burn_in", 0)]
    # A checkpoint of a run that was stopped restores the epoch of this stop.
    stops = [rule.stopped_epoch for rule in rules if rule.stopped_epoch and trainer.should_stop]
    return {"burn_in": max(burn_ins, default=None), "stopped": max(stops, default=None)}


def flatness_figures(
    trainer: Trainer, history: Sequence[Mapping[str, Any]], report: FlatnessReport, accuracy: str | None, data: str
) -> dict[str, Any]:
    """Draw the history, a comparison of layers, and heat maps of block traces; return a dict from tags to figures."""
    shared: dict[str, Any] = {"report": report, "data": data}
    label = accuracy_key(trainer.callback_metrics, accuracy) or "accuracy"
    figures = {"history": plot_history(history, accuracy_label=label, **shared, **stopping_of(trainer))[0]}
    measure = "relative_flatness" if "relative_flatness" in history[-1] else "hessian_trace"
    if len(report.layers) > 1:
        figures["layers"] = plot_layers(report, measure, data=data)[0]
        figures["layer_history"] = plot_layer_history(history, measure, **shared)[0]
    whole = {name: layer for name, layer in report.layers.items() if layer.block_traces.ndim == 3}
    for name, layer in list(whole.items())[:MOST_HEAT_MAPS]:
        figures[f"block_traces/{name}"] = plot_block_traces(layer, data=data)[0]
    return figures
