"""Figures of results: each function draws into ``ax=`` or a new figure, and returns ``(figure, axes)``.

Nothing is shown or written to files. Needs matplotlib: ``pip install 'lightning-flatness[plots]'``.
"""

from lightning_flatness.plots.block_traces import plot_block_traces
from lightning_flatness.plots.history import plot_history
from lightning_flatness.plots.landscape.contour import plot_contour
from lightning_flatness.plots.landscape.line import plot_line
from lightning_flatness.plots.landscape.pair import plot_kept_and_recomputed
from lightning_flatness.plots.landscape.surface import plot_surface
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
