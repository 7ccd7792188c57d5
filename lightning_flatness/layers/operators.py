"""A layer's Hessian as an operator on kernels, made of what one observed forward pass leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import Curvature
from lightning_flatness.layers.affine import Calls, convolve, gradient_of_call, nodes_of, pull_back
from lightning_flatness.layers.closed_form import TailDerivatives
from lightning_flatness.layers.passes import ObservedPass
from lightning_flatness.layers.recording import ConvolutionCall


@dataclass(frozen=True)
class ColumnOperator:
    """The Gauss-Newton matrix of a layer, from the pulled-back columns of the loss's curvature."""

    calls: Sequence[ConvolutionCall]
    columns: Sequence[Tensor]  # δ, for every call (N, B, S, *output)
    signs: Tensor | None  # (N, B)

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """The product with a kernel, ``(S, ...)``; ``by_filter``, of every filter's own block with that filter."""
        deltas = [delta.reshape(*delta.shape[:3], -1) for delta in self.columns]  # (N, B, S, P)
        weights = torch.zeros_like(deltas[0][:, :, :, 0])
        for call, delta in zip(self.calls, deltas, strict=True):
            weights = weights + torch.einsum("nbsp,nsp->nbs", delta, convolve(call, kernel).flatten(2))
        if not by_filter:
            weights = weights.sum(2, keepdim=True).expand_as(weights)
        if self.signs is not None:
            weights = weights * self.signs[:, :, None]
        total = torch.zeros_like(kernel)
        for call, delta in zip(self.calls, deltas, strict=True):
            total = total + gradient_of_call(call, torch.einsum("nbs,nbsp->nsp", weights, delta))
        return total

    @property
    def num_bytes(self) -> int:
        """That are kept."""
        return sum(tensor.nbytes for tensor in (*self.columns, *(call.inputs for call in self.calls)))


@dataclass(frozen=True)
class TailOperator:
    """The Hessian of a layer under the closed form."""

    call: ConvolutionCall
    tail: TailDerivatives
    curvature: Curvature
    diagonal: Tensor  # of VᵀΛV, (N, S)
    pulled: Tensor | None  # r = Vᵀ dloss/df, (N, S)

    def __call__(self, kernel: Tensor, by_filter: bool) -> Tensor:
        """The product with a kernel, ``(S, ...)``; ``by_filter``, of every filter's own block with that filter."""
        output = convolve(self.call, kernel)
        over = list(range(2, output.ndim))
        columns = self.tail.columns
        features = (self.tail.slopes * output).sum(over)  # (N, S)
        if by_filter:
            back = self.diagonal * features
        else:
            back = self.curvature.apply((features @ columns.T).double()).to(features.dtype) @ columns
        delta = _to_positions(back, output) * self.tail.slopes
        if self.tail.curvatures is not None and self.pulled is not None:
            delta = delta + _to_positions(self.pulled, output) * self.tail.curvatures * output
        return gradient_of_call(self.call, delta)

    @property
    def num_bytes(self) -> int:
        """That are kept."""
        twice = 1 if self.tail.curvatures is None else 2
        return twice * self.tail.slopes.nbytes + self.call.inputs.nbytes + self.diagonal.nbytes


Operator = ColumnOperator | TailOperator


def operators_of(seen: ObservedPass, max_bytes: float, advance: Callable[[float], None]) -> dict[str, Operator]:
    """The operators of all layers, for the samples of one forward pass.

    Raises:
        BatchError: they would keep more than ``max_bytes``.
    """
    operators: dict[str, Operator] = {}
    for name, tail in seen.tails.items():
        pulled = None
        if tail.curvatures is not None and seen.loss.residual is not None:
            pulled = (seen.loss.residual @ tail.columns.double()).to(tail.columns.dtype)
        elif tail.curvatures is not None and bool(tail.curvatures.any()):
            raise BatchError(f"Layer '{name}': the activation after it is curved, and this batch has no targets.")
        curvature = seen.loss.curvature
        diagonal = curvature.diagonal(tail.columns).to(tail.columns.dtype)
        operators[name] = TailOperator(_without_graph(seen.layers[name][0][1]), tail, curvature, diagonal, pulled)
    others = {name: calls for name, calls in seen.layers.items() if name not in seen.tails}
    num_columns = seen.loss.curvature.num_columns
    needed = sum(node.nbytes for node in nodes_of(others)) * num_columns
    if needed > max_bytes:
        raise BatchError(
            f"The largest eigenvalues of {', '.join(map(repr, list(others)[:3]))} need {needed / 1e9:.2g} GB of "
            f"cotangents for {len(seen.logits)} samples and {num_columns} columns of the loss's curvature. Give fewer "
            "samples, fewer layers (layers=), or raise max_gigabytes=."
        )
    if others:
        operators |= _column_operators(others, seen, advance)
    return {name: operators[name] for name in seen.layers}


def _column_operators(
    layers: dict[str, Calls], seen: ObservedPass, advance: Callable[[float], None]
) -> dict[str, ColumnOperator]:
    curvature, logits = seen.loss.curvature, seen.logits
    pulled = []
    for index in range(curvature.num_columns):
        pulled.append(pull_back(logits, nodes_of(layers), curvature.column(index).to(logits.dtype)))
        advance((index + 1) / curvature.num_columns)
    signs = None if curvature.signs is None else curvature.signs.to(logits.dtype)
    by_node = iter(list(zip(*pulled, strict=True)))
    return {
        name: ColumnOperator(
            [_without_graph(call) for _, call in calls],
            [
                torch.stack([delta.movedim(call.channel_dimension, 1) for delta in next(by_node)], dim=1)
                for _, call in calls
            ],
            signs,
        )
        for name, calls in layers.items()
    }


def _without_graph(call: ConvolutionCall) -> ConvolutionCall:
    return replace(call, output=call.output.new_empty(0))


def _to_positions(per_channel: Tensor, output: Tensor) -> Tensor:
    return per_channel.reshape(*per_channel.shape, *[1] * (output.ndim - 2))
