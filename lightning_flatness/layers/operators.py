"""A layer's Hessian as an operator on kernels, computed from one certified forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, naming
from lightning_flatness.functional import Curvature
from lightning_flatness.layers.certificates.tail import TailDerivatives
from lightning_flatness.layers.certified import CertifiedPass
from lightning_flatness.layers.closed_form import curved_part
from lightning_flatness.layers.cotangents import convolve, gradient_of_convolution, nodes_of, pull_back, to_positions
from lightning_flatness.layers.recording import Convolution


@dataclass(frozen=True)
class ColumnOperator:
    """The Gauss-Newton matrix of a layer, from pulled-back columns of the factor of the loss's curvature."""

    convolutions: Sequence[Convolution]
    columns: Sequence[Tensor]  # δ, for every convolution (N, B, S, *output)
    signs: Tensor | None  # (N, B)

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """Return the product with a kernel ``(S, ...)``; ``by_filter``, only with each filter's diagonal block."""
        deltas = [delta.reshape(*delta.shape[:3], -1) for delta in self.columns]  # (N, B, S, P)
        weights = torch.zeros_like(deltas[0][:, :, :, 0])
        for convolution, delta in zip(self.convolutions, deltas, strict=True):
            weights = weights + torch.einsum("nbsp,nsp->nbs", delta, convolve(convolution, kernel).flatten(2))
        if not by_filter:
            weights = weights.sum(2, keepdim=True).expand_as(weights)
        if self.signs is not None:
            weights = weights * self.signs[:, :, None]
        total = torch.zeros_like(kernel)
        for convolution, delta in zip(self.convolutions, deltas, strict=True):
            total = total + gradient_of_convolution(convolution, torch.einsum("nbs,nbsp->nsp", weights, delta))
        return total

    @property
    def num_bytes(self) -> int:
        """The memory of the tensors that the operator keeps, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.columns, *(one.inputs for one in self.convolutions)))


@dataclass(frozen=True)
class TailOperator:
    """The Hessian of a layer under the closed form."""

    convolution: Convolution
    tail: TailDerivatives
    curvature: Curvature
    diagonal: Tensor  # of VᵀΛV, (N, S)
    pulled: Tensor | None  # r = Vᵀ dloss/df, (N, S)

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """Return the product with a kernel, as :class:`ColumnOperator` does."""
        output = convolve(self.convolution, kernel)
        over = list(range(2, output.ndim))
        columns = self.tail.columns
        features = (self.tail.slopes * output).sum(over)  # (N, S)
        if by_filter:
            back = self.diagonal * features
        else:
            back = self.curvature.apply((features @ columns.T).double()).to(features.dtype) @ columns
        delta = to_positions(back, output) * self.tail.slopes
        if self.tail.curvatures is not None and self.pulled is not None:
            delta = delta + to_positions(self.pulled, output) * self.tail.curvatures * output
        return gradient_of_convolution(self.convolution, delta)

    @property
    def num_bytes(self) -> int:
        """The memory of the tensors that the operator keeps, in bytes."""
        twice = 1 if self.tail.curvatures is None else 2
        return twice * self.tail.slopes.nbytes + self.convolution.inputs.nbytes + self.diagonal.nbytes


Operator = ColumnOperator | TailOperator


def operators_of(certified: CertifiedPass, max_bytes: float, advance: Callable[[float], None]) -> dict[str, Operator]:
    """Return, for every layer, its Hessian on the samples of one forward pass, as an operator on vectors.

    Raises:
        BatchError: the operators would hold more than ``max_bytes`` of memory.
    """
    tails = {name: _tail_operator(name, certified) for name in certified.tails}
    others = certified.others
    num_columns = certified.loss.curvature.num_columns
    needed = sum(node.nbytes for node in nodes_of(others)) * num_columns
    if needed > max_bytes:
        raise BatchError(
            f"The largest eigenvalues of {', '.join(map(repr, list(others)[:3]))} need {needed / 1e9:.2g} GB of "
            f"cotangents for {len(certified.recorded.logits)} samples and {num_columns} columns of the curvature. Give "
            "fewer samples, fewer layers (layers=), or raise max_gigabytes=."
        )
    columns = _column_operators(certified, advance) if others else {}
    return {name: tails[name] if name in tails else columns[name] for name in certified.calls}


def _tail_operator(name: str, certified: CertifiedPass) -> TailOperator:
    tail, loss = certified.tails[name], certified.loss
    with naming(name):
        curved = curved_part(tail, loss)
    pulled = None if curved is None else (curved[1] @ tail.columns.double()).to(tail.columns.dtype)
    diagonal = loss.curvature.diagonal(tail.columns).to(tail.columns.dtype)
    convolution = _without_graph(certified.calls[name][0].convolution)
    return TailOperator(convolution, tail, loss.curvature, diagonal, pulled)


def _column_operators(certified: CertifiedPass, advance: Callable[[float], None]) -> dict[str, ColumnOperator]:
    curvature, logits, others = certified.loss.curvature, certified.recorded.logits, certified.others
    pulled = []
    for index in range(curvature.num_columns):
        pulled.append(pull_back(logits, nodes_of(others), curvature.column(index).to(logits.dtype)))
        advance((index + 1) / curvature.num_columns)
    signs = None if curvature.signs is None else curvature.signs.to(logits.dtype)
    by_node = iter(list(zip(*pulled, strict=True)))
    operators = {}
    for name, of_layer in others.items():
        convolutions = [call.convolution for call in of_layer]
        columns = [
            torch.stack([delta.movedim(one.channel_dimension, 1) for delta in next(by_node)], dim=1)
            for one in convolutions
        ]
        operators[name] = ColumnOperator([_without_graph(one) for one in convolutions], columns, signs)
    return operators


def _without_graph(convolution: Convolution) -> Convolution:
    return replace(convolution, output=convolution.output.new_empty(0))
