"""Flatness measures: contractions ``sum(Q * T)`` of the block traces with a matrix built from the weights alone.

``T`` and the weight Gram matrix have shape ``(G, S/G, S/G)``: in a grouped convolution, filters of different groups see
different inputs, so pairs across groups do not enter (``docs/theory.md``, "Groups"). All but relative flatness need
their diagonals only, and take these, ``(G, S/G)``, as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 1024  # of the weight that are taken in float64 at a time


def weight_gram(weight: Tensor, groups: int = 1, diagonal: bool = False) -> Tensor:
    """Inner products ``<w_s, w_s'>`` of the filters of one layer, within groups.

    Args:
        weight: the kernel, shape ``(S, C/G, *kernel_size)`` (or any ``(S, ...)``).
        groups: the number of groups ``G`` of the convolution.
        diagonal: only the squared norms.

    Returns:
        float64 tensor of shape ``(G, S/G, S/G)``, or ``(G, S/G)`` for the diagonal.

    Example:
        >>> weight_gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[[5., 6.],
                 [6., 9.]]], dtype=torch.float64)
    """
    rows = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
    # In float64 a part at a time: all of it would be twice the weight.
    parts = (part.double() for part in rows.split(COLUMNS, dim=2))
    return sum(
        (part.square().sum(2) if diagonal else part @ part.mT for part in parts),
        rows.new_zeros((), dtype=torch.float64),
    )


def weight_norm(gram: Tensor) -> Tensor:
    """Frobenius norm ``‖W‖_F`` of the kernel, from its Gram matrix ``(G, S/G, S/G)``.

    Example:
        >>> weight_norm(torch.tensor([[[9.0, 1.0], [1.0, 16.0]]]))
        tensor(5.)
    """
    return _diagonal(gram).sum().sqrt()


def filter_traces(block_traces: Tensor) -> Tensor:
    """Trace of every filter's own Hessian block, ``T[s, s]``: shape ``(S,)``, in the order of the filters.

    Example:
        >>> filter_traces(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]))
        tensor([2., 3.])
    """
    return _diagonal(block_traces).flatten()


def hessian_trace(block_traces: Tensor) -> Tensor:
    """Trace of the layer's Hessian block, ``sum_s T[s, s]``, in units of loss per squared weight.

    Example:
        >>> hessian_trace(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]))
        tensor(5.)
    """
    return _diagonal(block_traces).sum()


def relative_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Relative flatness ``kappa_Tr = sum_{s, s'} <w_s, w_s'> T[s, s']``, in units of the loss.

    Invariant under rescaling of filters that leaves the network's function as it is. Source: Petzka et al. 2021
    (arXiv 2001.00939), Definition 3; for convolutions Taleghani et al. 2026 (arXiv 2603.09016).

    Args:
        block_traces: ``(G, S/G, S/G)``.
        gram: inner products of the filters, same shape (:func:`weight_gram`).

    Example:
        >>> relative_flatness(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
        tensor(22.)
    """
    return block_traces.flatten() @ gram.flatten()


def filter_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Every filter's own part ``‖w_s‖² T[s, s]``: shape ``(S,)``; their sum is the neuron-wise flatness.

    Example:
        >>> filter_flatness(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
        tensor([2., 6.])
    """
    return (_diagonal(block_traces) * _diagonal(gram)).flatten()


def neuronwise_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Neuron-wise flatness ``sum_s ‖w_s‖² T[s, s]``. Source: Petzka et al. 2019 (arXiv 1912.00058).

    Example:
        >>> neuronwise_flatness(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
        tensor(8.)
    """
    return filter_flatness(block_traces, gram).sum()


def layerwise_flatness(block_traces: Tensor, gram: Tensor) -> Tensor:
    """Layer-wise flatness ``‖W‖_F² Tr(H)``. Source: Petzka et al. 2019 (arXiv 1912.00058).

    Example:
        >>> layerwise_flatness(torch.tensor([[[2.0, 7.0], [7.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
        tensor(15.)
    """
    return _diagonal(gram).sum() * hessian_trace(block_traces)


def measures_of(block_traces: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """All measures, and the weight norm, by name; from diagonals, all but relative flatness.

    Example:
        >>> sorted(measures_of(torch.ones(1, 2), torch.ones(1, 2)))
        ['hessian_trace', 'layerwise_flatness', 'neuronwise_flatness', 'weight_norm']
    """
    found = {
        "hessian_trace": hessian_trace(block_traces),
        "neuronwise_flatness": neuronwise_flatness(block_traces, gram),
        "layerwise_flatness": layerwise_flatness(block_traces, gram),
        "weight_norm": weight_norm(gram),
    }
    if block_traces.ndim == 3:
        found["relative_flatness"] = relative_flatness(block_traces, gram)
    return found


def _diagonal(matrices: Tensor) -> Tensor:
    if matrices.ndim == 2:
        return matrices
    return torch.diagonal(matrices, dim1=-2, dim2=-1)
