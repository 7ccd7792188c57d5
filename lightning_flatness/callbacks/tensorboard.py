"""Charts and figures for TensorBoard; other loggers are passed over."""

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

# Of many layers the user can draw more with plot_block_traces.
MOST_HEAT_MAPS = 8


def writers(trainer: Trainer) -> list[Any]:
    """Return the ``SummaryWriter`` of every TensorBoard logger; none on other ranks than zero."""
    if not trainer.is_global_zero:
        return []
    loaded = [sys.modules[f"{root}.loggers"] for root in ROOTS if f"{root}.loggers" in sys.modules]
    kinds = tuple(module.TensorBoardLogger for module in loaded)
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, kinds)]


def add_joint_charts(trainer: Trainer, tags: Sequence[str], accuracies: Sequence[str | None]) -> None:
    """Lay out charts of every callback's flatness, by tag, and accuracy, if any, on the Custom Scalars page.

    There is a chart for every callback and, if there are several, one for all, in a single layout, since TensorBoard
    reads one for a run. A chart has one linear axis, so its values must be of one order of magnitude.
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
    """Draw curves over the epochs, layers side by side and heat maps of block traces; by tag without prefix."""
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
    """Add figures to the Images page, at the present step. They are drawn only if there is a TensorBoard logger."""
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
    """Return the step at which Lightning logs the scalars of the last step."""
    return max(0, trainer.global_step - 1)
