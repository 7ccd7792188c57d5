"""Flatness measures ``sum(Q * T)`` of block traces ``T``, where the matrix ``Q`` depends on the weights alone.

``T[s, s']`` is the trace of the Hessian's block for the filters ``s`` and ``s'``, in loss per squared weight. ``T`` and
the Gram matrix of the filters have the shape ``(G, S/G, S/G)``. Pairs of filters in different groups do not contribute
(``docs/theory.md``, "Groups"). Relative flatness uses all entries. The other measures use only the diagonals of ``T``
and of the Gram matrix, and so also accept ``(G, S/G)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Number of columns of the weight that are converted to float64 at a time.
COLUMNS = 1024


def weight_gram(weight: Tensor, groups: int = 1, diagonal: bool = False) -> Tensor:
    """Compute ``<w_s, w_s'>`` for all pairs of filters of a kernel ``(S, ...)`` that are in the same group.

    The result is float64 ``(G, S/G, S/G)``. With ``diagonal`` it has only the filters' squared norms, ``(G, S/G)``.

    Args:
        weight: the kernel, ``(S, ...)``.
        groups: ``G``, the number of groups.
        diagonal: compute only the squared norms of the filters.

    Example:
        >>> weight_gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[[5., 6.],
                 [6., 9.]]], dtype=torch.float64)
    """
    rows = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
    # Convert a part at a time, since the whole weight in float64 would take twice the memory of the weight.
    parts = (part.double() for part in rows.split(COLUMNS, dim=2))
    return sum(
        (part.square().sum(2) if diagonal else part @ part.mT for part in parts),
        rows.new_zeros((), dtype=torch.float64),
    )


def weight_norm(gram: Tensor) -> Tensor:
    """Compute the Frobenius norm ``‖W‖_F`` of the kernel, a scalar, from its Gram matrix.

    Args:
        gram: inner products of the filters, ``(G, S/G, S/G)``, or the diagonals, ``(G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> weight_norm(weight_gram(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
        tensor(5., dtype=torch.float64)
    """
    return _diagonal(gram).sum().sqrt()


def filter_traces(block_traces: Tensor) -> Tensor:
    """Return for each of the ``S`` filters the trace of its own block of the Hessian, in loss per squared weight.

    The result has shape ``(S,)``. It consists of the diagonal entries of the block traces ``T``.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.

    Example:
        >>> T = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
        >>> filter_traces(T)
        tensor([2., 3.])
    """
    return _diagonal(block_traces).flatten()


def hessian_trace(block_traces: Tensor) -> Tensor:
    """Compute the trace ``sum_s T[s, s]`` of the layer's Hessian, a scalar in units of loss per squared weight.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.

    Example:
        >>> T = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]])
        >>> hessian_trace(T)
        tensor(5.)
    """
    return _diagonal(block_traces).sum()


def relative_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Compute relative flatness ``κ = sum_{s, s'} <w_s, w_s'> T[s, s']``, a scalar in units of the loss.

    ``κ`` stays the same if the layer's own filters are rescaled and later layers undo this. ``κ`` changes if the
    layer's input channels are rescaled by different factors and its filters undo this (``docs/theory.md``,
    "Invariance"). See Petzka et al. 2021 (arXiv 2001.00939), Definition 3, and Taleghani et al. 2026 (arXiv 2603.09016)
    for convolutions.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, in loss per squared weight.
        gram: inner products of the filters, ``(G, S/G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> T, gram = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
        >>> relative_flatness(T, gram)
        tensor(22.)
    """
    return block_traces.flatten() @ gram.flatten()


def filter_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Compute ``‖w_s‖² T[s, s]`` of every filter, ``(S,)``, in units of the loss; the sum is neuron-wise flatness.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.
        gram: inner products of the filters, ``(G, S/G, S/G)``, or the diagonals, ``(G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> T, gram = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
        >>> filter_flatness(T, gram)
        tensor([2., 6.])
    """
    return (_diagonal(block_traces) * _diagonal(gram)).flatten()


def neuronwise_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Compute ``sum_s ‖w_s‖² T[s, s]`` (Petzka et al. 2019, arXiv 1912.00058), a scalar in units of the loss.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.
        gram: inner products of the filters, ``(G, S/G, S/G)``, or the diagonals, ``(G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> T, gram = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
        >>> neuronwise_flatness(T, gram)
        tensor(8.)
    """
    return filter_flatness(block_traces, gram).sum()


def layerwise_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Compute ``‖W‖_F² Tr(H)`` (Petzka et al. 2019, arXiv 1912.00058), a scalar in units of the loss.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.
        gram: inner products of the filters, ``(G, S/G, S/G)``, or the diagonals, ``(G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> T, gram = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
        >>> layerwise_flatness(T, gram)
        tensor(15.)
    """
    return _diagonal(gram).sum() * hessian_trace(block_traces)


def measures_of(block_traces: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """Compute the Hessian trace, the flatness measures and the weight norm of a layer, as a dict of scalars by name.

    Relative flatness is missing if only the diagonals of ``T`` are given.

    Args:
        block_traces: ``T``, ``(G, S/G, S/G)``, or its diagonals, ``(G, S/G)``.
        gram: inner products of the filters, ``(G, S/G, S/G)``, or the diagonals, ``(G, S/G)``; see :func:`weight_gram`.

    Example:
        >>> T, gram = torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
        >>> sorted(measures_of(T, gram))
        ['hessian_trace', 'layerwise_flatness', 'neuronwise_flatness', 'relative_flatness', 'weight_norm']
    """
    measures = {
        "hessian_trace": hessian_trace(block_traces),
        "neuronwise_flatness": neuronwise_flatness(block_traces, gram),
        "layerwise_flatness": layerwise_flatness(block_traces, gram),
        "weight_norm": weight_norm(gram),
    }
    if block_traces.ndim == 3:
        measures["relative_flatness"] = relative_flatness(block_traces, gram)
    return measures


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices if matrices.ndim == 2 else torch.diagonal(matrices, dim1=-2, dim2=-1)
