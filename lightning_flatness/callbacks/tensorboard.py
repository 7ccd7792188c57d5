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


def add_joint_charts(trainer: Trainer, tags: Sequence[str], accuracies: Sequence[str | None]) -> None:
    """Add charts with flatness and accuracy to TensorBoard's page Custom Scalars.

    ``tags`` and ``accuracies`` contain the key of flatness and the key of accuracy, if any, of every callback. There is
    one chart per callback and, if there are several callbacks, a chart with all keys. TensorBoard reads only one layout
    per run, so one layout contains all charts. A chart has one linear axis, so its values must be of similar size.
    """
    charts = [[tag] if accuracy is None else [accuracy, tag] for tag, accuracy in zip(tags, accuracies, strict=True)]
    if len(charts) > 1:
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        charts = [[*dict.fromkeys(known), *tags], *charts]
    layout = {" and ".join(chart): ["Multiline", [f"^{re.escape(tag)}$" for tag in chart]] for chart in charts}
    for writer in writers(trainer):
        writer.add_custom_scalars({"flatness": layout})


def flatness_figures(
    history: Sequence[Mapping[str, float | None]], report: FlatnessReport, accuracy: str | None, data: str
) -> dict[str, Any]:
    """Draw the history, a comparison of layers and heat maps of block traces, as a dict from tags to figures."""
    figures = {"history": plot_history(history, accuracy_label=accuracy or "accuracy", data=data)[0]}
    measure = "relative_flatness" if "relative_flatness" in history[-1] else "hessian_trace"
    if len(report.layers) > 1:
        figures["layers"] = plot_layers(report, measure)[0]
        figures["layer_history"] = plot_layer_history(history, measure)[0]
    whole = {name: layer for name, layer in report.layers.items() if layer.block_traces.ndim == 3}
    for name, layer in list(whole.items())[:MOST_HEAT_MAPS]:
        figures[f"block_traces/{name}"] = plot_block_traces(layer)[0]
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
