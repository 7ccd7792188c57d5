"""From what a user asks for to the directions of a landscape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, normalized, orthogonal_to, random_direction
from lightning_flatness.measure.landscape_options import LandscapeOptions
from lightning_flatness.model.named_tensors import NamedDirection, NamedTensors

MOMENTS = ("exp_avg", "exp_avg_sq")


class Axes(NamedTuple):
    """The axes of a line or plane, ready to use."""

    names: tuple[str, ...]
    directions: tuple[Direction, ...]
    units: tuple[str, ...]  # of the normalisation, of each
    epsilons: dict[str, float] | None  # of Adam's update


def find_axes(
    options: LandscapeOptions,
    tensors: NamedTensors,
    weights: Mapping[str, Tensor],
    frozen: set[str],
    *,
    optimizer: Any,
    eigenvectors: Callable[[int], Sequence[Any]],
) -> Axes:
    """Directions for the axes, without what is frozen, normalised. The i-th mention of a kind is its i-th direction.

    Args:
        options: of the landscape.
        tensors: of the model.
        weights: its parameters and buffers in the precision they are measured in, by name.
        frozen: names that do not move.
        optimizer: with Adam's moments.
        eigenvectors: of the Hessian, as many as are asked for.

    Raises:
        FlatnessError: see :func:`~lightning_flatness.loss_landscape`.
    """
    kinds = [axis if isinstance(axis, str) else "given" for axis in options.axes]
    generator = torch.Generator().manual_seed(options.seed)
    moments: Sequence[Direction] = ()
    epsilons: dict[str, float] | None = None
    if "adam" in kinds:
        moments, epsilons = adam_moments(optimizer, tensors, of_step=options.update == "adam")
    hessian = eigenvectors(kinds.count("hessian")) if "hessian" in kinds else ()
    names: list[str] = []
    directions: list[Direction] = []
    for index, (axis, kind) in enumerate(zip(options.axes, kinds, strict=True)):
        turn = kinds[:index].count(kind)
        name = MOMENTS[turn] if kind == "adam" else f"{DESCRIPTIONS[kind]} {turn + 1}"
        if isinstance(axis, NamedDirection):
            name = axis.name
        if kind == "random":
            direction = random_direction({key: weights[key] for key in tensors.parameters}, generator)
        else:
            given = moments[turn] if kind == "adam" else hessian[turn] if kind == "hessian" else axis
            direction = tensors.direction(given, f"The axis '{name}'")
        direction = {key: tensor for key, tensor in direction.items() if key not in frozen}
        if kind == "random" and turn:
            direction = orthogonal_to(direction, directions[kinds.index("random")])
        names.append(name)
        directions.append(direction)
    units = tuple(options.normalize or ("filter" if kind == "random" else "none") for kind in kinds)
    if options.update != "adam":
        directions = [
            normalized(direction, weights, unit, options.norm, options.biases)
            for direction, unit in zip(directions, units, strict=True)
        ]
    for name, direction in zip(names, directions, strict=True):
        _check_moves(name, direction)
    if options.update == "adam" and len(directions) == 1:  # along a line, too, Adam's step takes both moments
        directions.append({key: tensor.double() for key, tensor in moments[1].items() if key not in frozen})
    return Axes(tuple(names), tuple(directions), units, epsilons if options.update == "adam" else None)


DESCRIPTIONS = {"random": "random direction", "hessian": "eigenvector", "given": "direction"}


def _check_moves(name: str, direction: Direction) -> None:
    if not any(bool(tensor.any()) for tensor in direction.values()):
        raise FlatnessError(
            f"The axis '{name}' is zero: all that it moves is frozen, or is a bias where biases='zero' (there is "
            "biases='scaled'), or has weights that are zero."
        )


def adam_moments(
    optimizer: Any, tensors: NamedTensors, of_step: bool = False
) -> tuple[tuple[Direction, Direction], dict[str, float]]:
    """``exp_avg`` and ``exp_avg_sq`` of an optimizer, as they are, by name; and its ``eps``.

    Args:
        optimizer: one of torch's that keeps Adam's moments, or a list of such, of different parameters.
        tensors: of the model.
        of_step: the second moment by which the step divides: with ``amsgrad``, its largest value.

    Raises:
        FlatnessError: no optimizer, one without these, or one of another model.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> (first, second), _ = adam_moments(optimizer, NamedTensors(model))
        >>> bool((first["bias"] == optimizer.state[model.bias]["exp_avg"]).all())
        True
    """
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers or not all(hasattr(one, "param_groups") and hasattr(one, "state") for one in optimizers):
        raise FlatnessError(
            f"axes='adam' takes the moments of an optimizer, and optimizer is a {type(optimizer).__name__}; give "
            "optimizer=, the torch.optim.Adam (AdamW, NAdam, RAdam) that has trained this model."
        )
    names = {id(tensor): name for name, tensor in tensors.parameters.items()}
    first: Direction = {}
    second: Direction = {}
    epsilons: dict[str, float] = {}
    known = False
    for of, group in ((each, group) for each in optimizers for group in each.param_groups):
        for parameter in group["params"]:
            known = known or id(parameter) in names
            state = of.state.get(parameter, {})
            if id(parameter) in names and all(moment in state for moment in MOMENTS):
                name = names[id(parameter)]
                first[name], second[name] = (state[moment] for moment in MOMENTS)
                if of_step and group.get("amsgrad"):
                    second[name] = state["max_exp_avg_sq"]
                epsilons[name] = float(group.get("eps", 1e-8))
    if not known:
        raise FlatnessError("optimizer= does not have the parameters of this model; it was made for another one.")
    if not first:
        raise FlatnessError(
            f"The optimizer, {', '.join(type(each).__name__ for each in optimizers)}, keeps no exp_avg and exp_avg_sq: "
            "it is not Adam, or has made no step yet. Train, or load its state dict."
        )
    return (first, second), epsilons
