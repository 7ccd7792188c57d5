"""What goes to TensorBoard beside the scalars; other loggers are passed over."""

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

# More heat maps than this are for plot_block_traces.
MOST_HEAT_MAPS = 8


def writers(trainer: Trainer) -> list[Any]:
    """The ``SummaryWriter`` of every TensorBoard logger; none on other ranks than zero."""
    if not trainer.is_global_zero:
        return []
    loaded = [sys.modules[f"{root}.loggers"] for root in ROOTS if f"{root}.loggers" in sys.modules]
    kinds = tuple(module.TensorBoardLogger for module in loaded)
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, kinds)]


def add_joint_charts(trainer: Trainer, charts: Sequence[Sequence[str]]) -> None:
    """Lay out charts, each of several scalars, on the Custom Scalars page; TensorBoard reads one layout of a run.

    A chart has one linear axis for all its tags, so they must be of one order of magnitude.
    """
    layout = {" and ".join(tags): ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for tags in charts}
    for writer in writers(trainer):
        writer.add_custom_scalars({"flatness": layout})


def add_figures(
    trainer: Trainer,
    prefix: str,
    history: Sequence[Mapping[str, float | None]],
    report: FlatnessReport,
    accuracy: str | None,
    data: str,
) -> None:
    """Add curves, layers side by side and heat maps of block traces to the Images page, at the present step."""

    def draw() -> dict[str, Any]:
        figures = {"history": plot_history(history, accuracy_label=accuracy or "accuracy", data=data)[0]}
        measure = "relative_flatness" if "relative_flatness" in history[-1] else "hessian_trace"
        if len(report.layers) > 1:
            figures["layers"] = plot_layers(report, measure)[0]
            figures["layer_history"] = plot_layer_history(history, measure)[0]
        whole = {name: layer for name, layer in report.layers.items() if layer.block_traces.ndim == 3}
        for name, layer in list(whole.items())[:MOST_HEAT_MAPS]:
            figures[f"block_traces/{name}"] = plot_block_traces(layer)[0]
        return figures

    add_drawn(trainer, prefix, draw, "FlatnessCallback")


def add_drawn(trainer: Trainer, prefix: str, draw: Callable[[], Mapping[str, Any]], callback: str) -> None:
    """Add figures to the Images page, at the present step; they are drawn only where there is one.

    Args:
        trainer: with loggers.
        prefix: of the tags.
        draw: to figures by tag.
        callback: its name, for a warning where they cannot be drawn.
    """
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
    """Where Lightning puts the scalars of the last step."""
    return max(0, trainer.global_step - 1)
