"""Figures of results. Each function draws into the axes ``ax`` or a new figure, and returns the figure and its axes.

The functions do not show figures or write files. They raise :class:`FlatnessError` if matplotlib is missing (``pip
install matplotlib``) or if the data cannot be drawn.
"""

from lightning_flatness.plots.block_traces import plot_block_traces
from lightning_flatness.plots.comparison import plot_comparison
from lightning_flatness.plots.contour import plot_contour, plot_kept_and_recomputed, shared_levels
from lightning_flatness.plots.gap import plot_gap
from lightning_flatness.plots.history import plot_history, plot_layer_history
from lightning_flatness.plots.layers import plot_layers
from lightning_flatness.plots.line import plot_line
from lightning_flatness.plots.spectrum import plot_density, plot_eigenvalues
from lightning_flatness.plots.surface import plot_surface

__all__ = [
    "plot_block_traces", "plot_comparison", "plot_contour", "plot_density", "plot_eigenvalues", "plot_gap",
    "plot_history", "plot_kept_and_recomputed", "plot_layer_history", "plot_layers", "plot_line", "plot_surface",
    "shared_levels",
]  # fmt: skip
