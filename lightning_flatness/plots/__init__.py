"""Figures from results: ``(figure, axes)`` back, ``ax=`` accepted; no files, no ``show``. Needs the extra ``plots``."""

from lightning_flatness.plots.block_traces import plot_block_traces
from lightning_flatness.plots.history import plot_history
from lightning_flatness.plots.landscape import plot_contour, plot_kept_and_recomputed, plot_line, plot_surface
from lightning_flatness.plots.layers import plot_layer_history, plot_layers
from lightning_flatness.plots.spectrum import plot_density, plot_eigenvalues

__all__ = [
    "plot_block_traces",
    "plot_contour",
    "plot_density",
    "plot_eigenvalues",
    "plot_history",
    "plot_kept_and_recomputed",
    "plot_layer_history",
    "plot_layers",
    "plot_line",
    "plot_surface",
]
