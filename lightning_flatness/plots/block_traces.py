"""Draw the block traces of one layer as a heat map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_flatness.checks import check_type
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots.canvas import axes_or_new, set_heading, short
from lightning_flatness.plots.words import exactness, known_error
from lightning_flatness.results import LayerFlatness
from lightning_flatness.results.texts import measured, samples_of

# Negative is dark, zero grey and positive light, so that the sign can be seen in a print without colours.
COLOURS = "cividis"
CLIPPED = 0.99  # the colour scale ends at this quantile of |T|


def plot_block_traces(
    layer: LayerFlatness, *, sort: bool = True, data: str | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Draw the block traces of a layer as a heat map. Positive entries are light, negative entries are dark.

    The entry ``T[s, s']`` is the trace of the Hessian's block of the filters ``s`` and ``s'``, in loss per squared
    weight. The colour scale ends at the 99th percentile of ``|T|``, so that a few large entries do not hide the rest;
    the title says how many entries are larger. The frame is dashed if the numbers are not exact.

    Args:
        layer: a layer of a :class:`~lightning_flatness.FlatnessReport`.
        sort: within each group of a grouped convolution, place filters with large common entries ``T[s, s']`` next to
            each other. For this, ``T`` is scaled to a unit diagonal. The two leading eigenvectors of the scaled matrix
            place every filter at a point of a plane, and filters are sorted by the angles of these points.
        data: name of the measured data, for the title: ``"val"``, ``"train"`` or another name.
        ax: axes to draw into; by default the axes of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        FlatnessError: only the diagonal of ``T`` was measured, or matplotlib is missing.

    Example:
        >>> import torch
        >>> from lightning_flatness import measure_flatness
        >>> net, batch = torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3)
        >>> report = measure_flatness(net, [batch], layers="all")
        >>> figure, ax = plot_block_traces(report.layers[""], sort=False)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ("filter s'", 'filter s')
    """
    check_type("layer", layer, LayerFlatness, "a layer of a FlatnessReport: report.layers['conv1']")
    if layer.block_traces.ndim != 3:
        raise FlatnessError(
            f"Layer '{layer.info.name}' has only the diagonal of block traces. Add 'relative_flatness' to measures=."
        )
    figure, ax = axes_or_new(ax, 5.8, 5.0)
    traces = layer.block_traces
    if sort:
        orders = [_by_interaction(block) for block in traces]
        traces = torch.stack([block[order][:, order] for block, order in zip(traces, orders, strict=True)])
    matrix = torch.block_diag(*traces)
    entries = traces.abs().flatten()
    known = entries[entries.isfinite()].sort().values
    limit = (float(known[int(CLIPPED * (len(known) - 1))]) or float(known[-1]) if len(known) else 0.0) or 1.0
    image = ax.imshow(matrix.numpy(), cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
    beyond = int((known > limit).sum())
    ax.set(xlabel="filter s'" + " (sorted)" * sort, ylabel="filter s" + " (sorted)" * sort)
    error = 2 * known_error(*(errors.get("hessian_trace") for errors in (layer.sampling_errors, layer.standard_errors)))
    clipped = ""
    if beyond:
        end, largest = (short(float(f"{value:.2g}")) for value in (limit, float(known[-1])))
        clipped = f"{beyond:,} of {len(entries):,} entries beyond ± {end}, up to {largest}"
        clipped = f"colours end at the 99th percentile: {clipped}"
    set_heading(
        ax,
        f"Layer {layer.info.name}: Hessian trace {measured(layer.hessian_trace, error)}"
        + (" (2 standard errors)" if error else ""),
        f"{samples_of(layer.num_samples, data)}; {exactness([layer.info])}",
        "sorted: filters with large common traces side by side" * sort,
        clipped,
    )
    bar = figure.colorbar(image, ax=ax, extend="both" if beyond else "neither")
    bar.set_label("block trace T[s, s']  (loss per squared weight)")
    bar.formatter.set_powerlimits((-2, 3))
    if not layer.exact:
        for spine in ax.spines.values():
            spine.set(linestyle=(0, (4, 3)), linewidth=2.0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure, ax


def _by_interaction(block: Tensor) -> Tensor:
    """Return indices that sort filters by their angle in the plane of the two leading eigenvectors.

    The eigenvectors are those of the block traces, scaled to a unit diagonal. Filters stay in their order if there are
    fewer than three, or if block traces are not finite.
    """
    if len(block) < 3 or not bool(block.isfinite().all()):
        return torch.arange(len(block), device="cpu")
    scale = block.diagonal().abs().clamp_min(torch.finfo(block.dtype).tiny).rsqrt()
    _, vectors = torch.linalg.eigh(block * scale[:, None] * scale)
    return torch.atan2(vectors[:, -2], vectors[:, -1]).argsort()
