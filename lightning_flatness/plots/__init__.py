"""Figures of results. Each function draws into the axes ``ax`` or a new figure, and returns the figure and its axes.

The functions do not show figures or write files. They raise :class:`FlatnessError` if matplotlib is missing (``pip
install 'lightning-flatness[plots]'``) or if the data cannot be drawn.

Example:
    >>> import torch
    >>> from lightning_flatness import hessian_spectrum, loss_landscape, measure_flatness
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    >>> batches = [(torch.randn(6, 2), torch.arange(6) % 3)]
    >>> report = measure_flatness(net, batches, layers="all")
    >>> figures = [plot_layers(report), plot_block_traces(report.layers["0"])]
    >>> history = [{"epoch": 0, "accuracy": 0.5, "relative_flatness": 3.0, "0/hessian_trace": 2.0}]
    >>> figures += [plot_history(history), plot_layer_history(history, "hessian_trace")]
    >>> spectrum = hessian_spectrum(net, batches, top_k=2)
    >>> figures += [plot_density(spectrum), plot_eigenvalues([(0, spectrum), (1, spectrum)])]
    >>> line, plane = (loss_landscape(net, batches, axes=n, steps=5) for n in (["random"], ["random", "random"]))
    >>> figures += [plot_line(line), plot_contour(plane), plot_surface(plane)]
    >>> net.append(torch.nn.BatchNorm1d(3))  # doctest: +ELLIPSIS
    Sequential(...
    >>> pair = (loss_landscape(net, batches, steps=5, batch_norm=name) for name in ("kept", "recomputed"))
    >>> figures += [plot_kept_and_recomputed(*pair)]
    >>> figures[0][1].get_xlabel(), figures[1][1].get_xlabel()
    ('relative flatness  (loss)', "filter s' (ordered by interaction)")
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
