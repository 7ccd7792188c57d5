"""Directions in weight space: random ones, their normalisation, Adam's step, the main directions of a trajectory.

A direction is a mapping from the names of tensors to tensors of their shapes, ``d``; the weights are ``w``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = dict[str, Tensor]

NORMALIZATIONS = ("none", "weight", "filter", "layer", "model")


def random_direction(like: Mapping[str, Tensor], generator: torch.Generator) -> Direction:
    """Independent standard normal numbers in float64, drawn on the CPU and so the same on every device.

    Args:
        like: tensors whose shapes and devices are used, in this order.
        generator: of the CPU.

    Example:
        >>> random_direction({"w": torch.zeros(2, 3)}, torch.Generator().manual_seed(0))["w"].shape
        torch.Size([2, 3])
    """
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        for name, tensor in like.items()
    }


def inner_product(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """``<d, d'>`` over the names that both have, in float64.

    Example:
        >>> inner_product({"w": torch.ones(3)}, {"w": torch.ones(3), "b": torch.ones(1)})
        3.0
    """
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one if name in other)


def direction_norm(direction: Mapping[str, Tensor], order: int = 2) -> float:
    """``(Σ |d|^p)^(1/p)`` over all tensors, in float64.

    Example:
        >>> direction_norm({"w": torch.tensor([3.0]), "b": torch.tensor([-4.0])})
        5.0
        >>> direction_norm({"w": torch.tensor([3.0]), "b": torch.tensor([-4.0])}, 1)
        7.0
    """
    norms = [torch.linalg.vector_norm(tensor.double(), order) for tensor in direction.values()]
    return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]), order)) if norms else 0.0


def orthogonal_to(direction: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Direction:
    """``d - d' <d, d'> / <d', d'>``: the part of a direction that is orthogonal to another one.

    Example:
        >>> orthogonal_to({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.0, 2.0])})["w"]
        tensor([1., 0.])
    """
    square = inner_product(other, other)
    share = inner_product(direction, other) / square if square else 0.0
    return {name: tensor - share * other[name] if name in other else tensor for name, tensor in direction.items()}


def normalized(
    direction: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    unit: str,
    order: int = 2,
    biases: Literal["zero", "scaled"] = "zero",
) -> Direction:
    """A direction whose parts have the norms of the weights' parts; a part that is zero stays zero.

    ``"filter"``: every slice along the first dimension, ``d_f ‖w_f‖ / ‖d_f‖``. ``"layer"``: every tensor. ``"model"``:
    all tensors together. ``"weight"``: every number, ``d w``. ``"none"``: as it is.

    Args:
        direction: to be normalised.
        weights: tensors by the same names.
        unit: one of the above.
        order: 1 or 2, of the norm.
        biases: of a direction that is normalised, tensors with one dimension or none (biases, BatchNorm) become
            ``"zero"``, or are ``"scaled"`` too; under ``"filter"`` such a tensor is one filter.

    Source:
        Li et al. 2018 (arXiv 1712.09913), Section 4, for filters; that biases do not move is the convention of the
        code of the paper.

    Example:
        >>> weights = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}
        >>> normalized({"w": torch.tensor([[1.0, 0.0], [2.0, 0.0]])}, weights, "filter")["w"]
        tensor([[5., 0.],
                [1., 0.]])
    """
    if unit == "none":
        return dict(direction)
    if biases == "zero":
        direction = {name: d if d.ndim > 1 else torch.zeros_like(d) for name, d in direction.items()}
    if unit == "weight":
        return {name: d * weights[name].to(d.dtype) for name, d in direction.items()}
    if unit == "model":
        moving = {name: weights[name] for name, d in direction.items() if bool(d.any())}
        norm = direction_norm(direction, order)
        factor = direction_norm(moving, order) / norm if norm else 0.0
        return {name: d * factor for name, d in direction.items()}
    return {name: _scaled(d, weights[name].to(d.dtype), unit == "filter", order) for name, d in direction.items()}


def _scaled(d: Tensor, w: Tensor, by_filter: bool, order: int) -> Tensor:
    """Every slice along the first dimension, or the whole tensor, to the norm of that of the weights."""
    rows = len(d) if by_filter and d.ndim > 1 else 1
    ours = torch.linalg.vector_norm(d.reshape(rows, -1), order, dim=1, keepdim=True)
    theirs = torch.linalg.vector_norm(w.reshape(rows, -1), order, dim=1, keepdim=True)
    factors = torch.where(ours > 0, theirs / ours, 0.0)
    return (d.reshape(rows, -1) * factors).reshape(d.shape)


def adam_step(first: Tensor, second: Tensor, scale: float | Tensor, epsilon: float) -> Tensor:
    """``m / (sqrt(β v) + ε)``: Adam's step for a learning rate of 1, its second moment times ``β``.

    Args:
        first: ``m``, as the optimizer keeps it, without the correction of its bias.
        second: ``v``, likewise.
        scale: ``β``, positive.
        epsilon: ``ε`` of the optimizer.

    Source:
        Kingma and Ba 2015 (arXiv 1412.6980), Algorithm 1, for the step; Gabdullin 2024 (arXiv 2412.10146) for taking
        it as the axes of a landscape.

    Example:
        >>> adam_step(torch.tensor(3.0), torch.tensor(4.0), 1.0, 1.0)
        tensor(1.)
    """
    return first / ((scale * second).sqrt() + epsilon)


class PrincipalDirections(NamedTuple):
    """The directions in which points differ most.

    Attributes:
        directions: orthonormal.
        coordinates: float64 ``(points, directions)``, of the points from the origin along them.
        explained: float64 ``(directions,)``, the share of the sum of squared distances from the origin.
    """

    directions: tuple[Direction, ...]
    coordinates: Tensor
    explained: Tensor


def principal_directions(offsets: Sequence[Mapping[str, Tensor]], number: int = 2) -> PrincipalDirections:
    """The first right singular vectors of the matrix with a row for every offset; not centred.

    They come from the eigenvectors of the small matrix of inner products. The sign is such that the first point with a
    coordinate that counts has a positive one.

    Args:
        offsets: points minus the origin, of which ``number`` at least are linearly independent.
        number: of directions.

    Source:
        Li et al. 2018 (arXiv 1712.09913), Section 7.2.

    Example:
        >>> found = principal_directions([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}])
        >>> found.coordinates, found.explained
        (tensor([[2., 0.],
                [0., 1.]], dtype=torch.float64), tensor([0.8000, 0.2000], dtype=torch.float64))
    """
    gram = torch.tensor([[inner_product(one, other) for other in offsets] for one in offsets], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:number], vectors.flip(1)[:, :number]
    coordinates = vectors * values.clamp_min(0).sqrt()
    large = coordinates.abs() > 1e-6 * coordinates.abs().amax(0)
    signs = coordinates.gather(0, large.int().argmax(0, keepdim=True)).sign()
    coordinates, vectors = coordinates * signs, vectors * signs
    directions: list[Direction] = []
    for k in range(number):
        weights = (vectors[:, k] / math.sqrt(float(values[k].clamp_min(torch.finfo(torch.float64).tiny)))).tolist()
        rows = [
            {name: weight * d.double() for name, d in row.items()} for weight, row in zip(weights, offsets, strict=True)
        ]
        directions.append({name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]})
    return PrincipalDirections(tuple(directions), coordinates, values / gram.trace())
