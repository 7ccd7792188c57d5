"""Figures from results: ``(figure, axes)`` back, ``ax=`` accepted; no files, no ``show``. Needs the extra ``plots``."""

from lightning_flatness.plots.block_traces import plot_block_traces
from lightning_flatness.plots.history import plot_history
from lightning_flatness.plots.layers import plot_layer_history, plot_layers
from lightning_flatness.plots.spectrum import plot_density, plot_eigenvalues

__all__ = ["plot_block_traces", "plot_density", "plot_eigenvalues", "plot_history", "plot_layer_history", "plot_layers"]
