"""Heat map of the block traces of one layer: which filters interact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new
from lightning_flatness.results import LayerFlatness


def plot_block_traces(layer: LayerFlatness, *, sort: bool = True, ax: Any | None = None) -> tuple[Any, Any]:
    """Draw the block traces ``T[s, s']`` of a layer as a heat map: positive entries red, negative ones blue.

    The colour scale ends at the 99th percentile of ``|T|``, so that a few large entries do not hide all others.

    Args:
        layer: one layer of a report; its block traces are in units of loss per squared weight.
        sort: place filters that interact side by side (within the groups of a grouped convolution), by the angle of
            their entries in the two leading eigenvectors of ``T``, normalised to a unit diagonal.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: matplotlib is missing, or only the diagonal was measured.

    Example:
        >>> from torch import nn
        >>> from lightning_flatness import measure_flatness
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> report = measure_flatness(net, [torch.randn(5, 1, 8, 8)])
        >>> figure, ax = plot_block_traces(report.layers["0"])
        >>> ax.get_xlabel()
        "filter s' (ordered by interaction)"
    """
    if layer.block_traces.ndim != 3:
        raise FlatnessError(
            f"Layer '{layer.info.name}' has only the diagonal of its block traces; measure 'relative_flatness' too."
        )
    figure, ax = axes_or_new(ax, 5.6, 4.6)
    traces = layer.block_traces
    if sort:
        orders = [_by_interaction(block) for block in traces]
        traces = torch.stack([block[order][:, order] for block, order in zip(traces, orders, strict=True)])
    matrix = torch.block_diag(*traces)
    entries = traces.abs().flatten()
    limit = float(entries.sort().values[int(0.99 * (len(entries) - 1))]) or float(entries.max()) or 1.0
    image = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, extend="both", label="block trace T[s, s']  (loss per squared weight)")
    bar.formatter.set_powerlimits((-2, 3))
    suffix = " (ordered by interaction)" if sort else ""
    ax.set_xlabel(f"filter s'{suffix}")
    ax.set_ylabel(f"filter s{suffix}")
    ax.set_title(f"{layer.info.name}: Hessian trace {layer.hessian_trace:.3g}", fontsize=10)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure, ax


def _by_interaction(block: Tensor) -> Tensor:
    """Order filters by their angle in the plane of the two leading eigenvectors of the normalised block traces."""
    if len(block) < 3:
        return torch.arange(len(block), device="cpu")
    scale = block.diagonal().abs().clamp_min(torch.finfo(block.dtype).tiny).rsqrt()
    _, vectors = torch.linalg.eigh(block * scale[:, None] * scale)
    return torch.atan2(vectors[:, -2], vectors[:, -1]).argsort()
