"""Multiply a layer's Hessian by kernels, using the tensors that one certified forward pass has recorded.

The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, naming
from lightning_flatness.functional import Curvature
from lightning_flatness.layers.certificates.tail import TailDerivatives
from lightning_flatness.layers.certified import CertifiedPass
from lightning_flatness.layers.closed_form import curved_part
from lightning_flatness.layers.convolution import Convolution
from lightning_flatness.layers.cotangents import convolve, gradient_of_convolution, nodes_of, pull_back, to_positions


@dataclass(frozen=True)
class ColumnOperator:
    """Multiplies kernels by a layer's Gauss-Newton matrix.

    Let ``Λ = B Bᵀ`` be the loss's second derivative at the logits. The operator keeps the columns of ``B``, pulled back
    to the layer's output, i.e. multiplied by the transposed Jacobian of the logits.
    """

    convolutions: Sequence[Convolution]
    columns: Sequence[Tensor]  # pulled-back columns, (N, number of columns, S, *output) for every convolution
    signs: Tensor | None  # signs of the columns, (N, number of columns); None if all are +1

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """Return the product of the matrix and a kernel ``(S, ...)``.

        With ``by_filter``, blocks of the matrix that belong to two different filters count as zero.
        """
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
        """The memory of the largest tensors that the operator keeps, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.columns, *(one.inputs for one in self.convolutions)))


@dataclass(frozen=True)
class TailOperator:
    """Multiplies kernels by the Hessian of a layer that is measured by the closed form.

    In the comments below, ``V`` is ``tail.columns``, which are columns of the classifier's weight. ``dloss/df`` and
    ``Λ`` are the first and the second derivative of the loss at the logits.
    """

    convolution: Convolution
    tail: TailDerivatives
    curvature: Curvature
    diagonal: Tensor  # diagonal of VᵀΛV, (N, S)
    pulled: Tensor | None  # Vᵀ dloss/df, (N, S); None if the tail is piecewise linear

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """Return the product of the Hessian and a kernel ``(S, ...)``.

        With ``by_filter``, blocks of the Hessian that belong to two different filters count as zero.
        """
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
        """The memory of the largest tensors that the operator keeps, in bytes."""
        twice = 1 if self.tail.curvatures is None else 2
        return twice * self.tail.slopes.nbytes + self.convolution.inputs.nbytes + self.diagonal.nbytes


Operator = ColumnOperator | TailOperator


def operators_of(certified: CertifiedPass, max_bytes: float, advance: Callable[[float], None]) -> dict[str, Operator]:
    """Return each layer's operator, which multiplies kernels by the Hessian, summed over the samples of a pass.

    For a layer that is measured by the Gauss-Newton method, the Gauss-Newton matrix replaces the Hessian. ``advance``
    is called with the fraction of the work that is done.

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
            f"memory, for the gradients of {len(certified.recorded.logits)} samples in {num_columns} backward passes. "
            "Give fewer samples, choose fewer layers with layers=, or raise max_gigabytes=."
        )
    columns = _column_operators(certified, advance) if others else {}
    return {name: tails[name] if name in tails else columns[name] for name in certified.calls}


def _tail_operator(name: str, certified: CertifiedPass) -> TailOperator:
    """Return the operator of a layer that is measured by the closed form."""
    tail, loss = certified.tails[name], certified.loss
    with naming(name):
        curved = curved_part(tail, loss)
    pulled = None if curved is None else (curved[1] @ tail.columns.double()).to(tail.columns.dtype)
    diagonal = loss.curvature.diagonal(tail.columns).to(tail.columns.dtype)
    convolution = certified.calls[name][0].convolution.without_output()
    return TailOperator(convolution, tail, loss.curvature, diagonal, pulled)


def _column_operators(certified: CertifiedPass, advance: Callable[[float], None]) -> dict[str, ColumnOperator]:
    """Return the operators of the layers that are measured by the Gauss-Newton method, keyed by layer name."""
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
        operators[name] = ColumnOperator([one.without_output() for one in convolutions], columns, signs)
    return operators
