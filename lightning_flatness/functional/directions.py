"""Directions in weight space: random directions, Adam's step, principal directions, and their normalisation.

A direction ``d`` is a dictionary that maps the names of a model's tensors to tensors of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = dict[str, Tensor]
"""A direction in weight space: tensors in the shapes of a model's tensors, by their names."""

NORMALIZATIONS = ("none", "weight", "filter", "layer", "model")
"""The values of ``unit`` in :func:`normalized`, which choose the parts of a direction that are rescaled."""


def random_direction(like: Mapping[str, Tensor], generator: torch.Generator) -> Direction:
    """Draw a direction of independent standard normal numbers in float64.

    The result has the names (in their order), shapes and devices of ``like``. The numbers are drawn on the CPU, so that
    they are the same for every device; ``generator`` must be a CPU generator.

    Args:
        like: tensors such as a model's parameters, by name.
        generator: CPU generator that draws the numbers.

    Example:
        >>> like = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> {name: tuple(d.shape) for name, d in random_direction(like, torch.Generator().manual_seed(0)).items()}
        {'w': (2, 3), 'b': (2,)}
    """
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        for name, tensor in like.items()
    }


def inner_product(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Compute the inner product ``<d, d'>`` of two directions over the names that both have, in float64.

    Args:
        one: ``d``, tensors by name.
        other: ``d'``, tensors by name; those of equal names have equal shapes.

    Example:
        >>> d, other = {"w": torch.tensor([3.0, -4.0]), "b": torch.zeros(1)}, {"w": torch.tensor([0.0, 2.0])}
        >>> inner_product(d, other)
        -8.0
    """
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one if name in other)


def direction_norm(direction: Mapping[str, Tensor], order: int = 2) -> float:
    """Compute the norm ``(Σ |d|^p)^(1/p)`` over the entries of all tensors, with ``p = order``, in float64.

    Args:
        direction: ``d``, tensors by name.
        order: ``p``, 1 or 2.

    Example:
        >>> d = {"w": torch.tensor([3.0, -4.0]), "b": torch.zeros(1)}
        >>> direction_norm(d), direction_norm(d, order=1)
        (5.0, 7.0)
    """
    norms = [torch.linalg.vector_norm(tensor.double(), order) for tensor in direction.values()]
    return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]), order)) if norms else 0.0


def orthogonal_to(direction: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Direction:
    """Compute ``d - d' <d, d'> / <d', d'>``, the part of a direction ``d`` orthogonal to another direction ``d'``.

    Args:
        direction: ``d``, tensors by name.
        other: ``d'``, tensors by name. If it is zero, ``d`` is returned.

    Example:
        >>> d, other = {"w": torch.tensor([3.0, -4.0]), "b": torch.zeros(1)}, {"w": torch.tensor([0.0, 2.0])}
        >>> orthogonal_to(d, other)["w"]
        tensor([3., 0.])
    """
    square = inner_product(other, other)
    factor = inner_product(direction, other) / square if square else 0.0
    return {name: tensor - factor * other[name] if name in other else tensor for name, tensor in direction.items()}


def normalized(
    direction: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    unit: str,
    order: int = 2,
    biases: Literal["zero", "scaled"] = "zero",
) -> Direction:
    """Rescale each part of a direction to the norm of the same part of the weights; zero parts stay zero.

    ``unit`` chooses the parts. With ``"filter"``, a part is a slice ``f`` of a tensor along its first dimension. The
    slice ``d_f`` of the direction becomes ``d_f ‖w_f‖ / ‖d_f‖``, where ``w_f`` is the same slice of the weights (Li et
    al. 2018, arXiv 1712.09913, Section 4). With ``"layer"``, a part is a tensor. With ``"model"``, all tensors whose
    direction is not zero form one part. ``"weight"`` uses no norm: every number ``d`` is multiplied by its weight
    ``w``. With ``"none"``, nothing is rescaled.

    Tensors with at most one dimension (biases, BatchNorm) are set to zero, as in the code of Li et al., unless ``unit``
    is ``"none"``. With ``biases="scaled"`` they are rescaled instead. With ``"filter"``, such a tensor counts as one
    filter.

    Args:
        direction: ``d``, tensors by name.
        weights: ``w``, tensors of the same names and shapes.
        unit: a name in :data:`NORMALIZATIONS`.
        order: 1 for the L1 norm, 2 for the L2 norm.
        biases: ``"zero"`` or ``"scaled"``.

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
    """Rescale ``d`` to the norm of ``w``.

    With ``by_filter``, rescale each ``d[i]`` to the norm of ``w[i]`` instead if ``d`` has more than one dimension.
    """
    rows = len(d) if by_filter and d.ndim > 1 else 1
    norms_d = torch.linalg.vector_norm(d.reshape(rows, -1), order, dim=1, keepdim=True)
    norms_w = torch.linalg.vector_norm(w.reshape(rows, -1), order, dim=1, keepdim=True)
    factors = torch.where(norms_d > 0, norms_w / norms_d, 0.0)
    return (d.reshape(rows, -1) * factors).reshape(d.shape)


def adam_step(first: Tensor, second: Tensor, scale: float | Tensor, epsilon: float) -> Tensor:
    """Compute Adam's step ``m / (sqrt(β v) + ε)`` for a learning rate of 1.

    Args:
        first: ``m``, the first moment in the state of the optimizer, without bias correction.
        second: ``v``, the second moment in the state of the optimizer, without bias correction.
        scale: ``β``, a number that multiplies ``v``; not one of Adam's decay rates.
        epsilon: ``ε``.

    Source:
        Kingma and Ba 2015 (arXiv 1412.6980), Algorithm 1; Gabdullin 2024 (arXiv 2412.10146) for this step in a loss
        landscape.

    Example:
        >>> adam_step(torch.tensor(3.0), torch.tensor(4.0), scale=1.0, epsilon=1.0)
        tensor(1.)
    """
    return first / ((scale * second).sqrt() + epsilon)


class PrincipalDirections(NamedTuple):
    """The directions in which a set of points differs most from an origin.

    Attributes:
        directions: the directions, orthonormal.
        coordinates: coordinates of the points in these directions, float64 ``(points, directions)``.
        explained: the share of the points' summed squared distances from the origin that each direction explains,
            float64 ``(directions,)``.

    Example:
        >>> plane = principal_directions([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}])
        >>> len(plane.directions), plane.coordinates.shape, plane.explained.shape
        (2, torch.Size([2, 2]), torch.Size([2]))
    """

    directions: tuple[Direction, ...]
    coordinates: Tensor
    explained: Tensor


def principal_directions(offsets: Sequence[Mapping[str, Tensor]], number: int = 2) -> PrincipalDirections:
    """Compute the first ``number`` right singular vectors of the matrix whose rows are the offsets.

    The offsets are points minus the origin; their mean is not subtracted. At least ``number`` offsets must be linearly
    independent. The singular vectors are computed from the eigenvectors of the small matrix of inner products. The sign
    of each direction is chosen so that the first point whose coordinate is not negligible has a positive one.

    Args:
        offsets: differences from the origin, each with tensors by name.
        number: number of directions.

    Source:
        Li et al. 2018 (arXiv 1712.09913), Section 7.2.

    Example:
        >>> plane = principal_directions([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}])
        >>> plane.coordinates, plane.explained
        (tensor([[2., 0.],
                [0., 1.]], dtype=torch.float64), tensor([0.8000, 0.2000], dtype=torch.float64))
    """
    products = [[inner_product(one, other) for other in offsets] for one in offsets]
    gram = torch.tensor(products, dtype=torch.float64, device="cpu")
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
