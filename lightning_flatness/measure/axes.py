"""Turn the axes that a user asks for into directions in weight space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.checks import plain
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, normalized, orthogonal_to, random_direction
from lightning_flatness.measure.landscape_options import LandscapeOptions
from lightning_flatness.model.directions import NamedDirection
from lightning_flatness.model.named_tensors import NamedTensors

DESCRIPTIONS = {"random": "random direction", "hessian": "eigenvector", "given": "direction"}
MOMENTS = ("exp_avg", "exp_avg_sq")


class Axes(NamedTuple):
    """The axes of a landscape: one axis for a line, two axes for a plane.

    ``names`` and ``units`` have one entry for each axis. ``directions`` are the normalised directions of the axes. With
    ``update="adam"``, ``directions`` are Adam's two moments instead, so that a line has one name but two directions.
    """

    names: tuple[str, ...]
    directions: tuple[Direction, ...]
    units: tuple[str, ...]  # the parts of each axis that are normalised, such as "filter"
    epsilons: dict[str, float] | None  # the eps of Adam's update for each parameter name


def find_axes(
    options: LandscapeOptions,
    tensors: NamedTensors,
    weights: Mapping[str, Tensor],
    frozen: set[str],
    *,
    optimizer: Any,
    eigenvectors: Callable[[int], Sequence[Any]],
) -> Axes:
    """Return the axes of a landscape, without the tensors in ``frozen``, which do not move.

    If both axes are of the same kind, the second axis takes the second direction of that kind, such as the second
    eigenvector. ``weights`` are the parameters and buffers in the precision of the measurement. ``eigenvectors(n)``
    computes ``n`` eigenvectors of the Hessian.
    """
    kinds = [axis if isinstance(axis, str) else "given" for axis in options.axes]
    as_adam = options.update == "adam"
    moments: Sequence[Direction] = ()
    epsilons: dict[str, float] | None = None
    if "adam" in kinds:
        moments, epsilons = adam_moments(optimizer, tensors, of_step=as_adam)
    generator = torch.Generator().manual_seed(options.seed)
    parameters = {name: weights[name] for name in tensors.parameters}
    sources: dict[str, Iterator[Any]] = {
        "random": (random_direction(parameters, generator) for _ in kinds),
        "adam": iter(moments),
        "hessian": iter(eigenvectors(kinds.count("hessian")) if "hessian" in kinds else ()),
        "given": (axis for axis in options.axes if not isinstance(axis, str)),
    }
    names: list[str] = []
    directions: list[Direction] = []
    for index, (axis, kind) in enumerate(zip(options.axes, kinds, strict=True)):
        turn = kinds[:index].count(kind)
        name = MOMENTS[turn] if kind == "adam" else f"{DESCRIPTIONS[kind]} {turn + 1}"
        names.append(axis.name if isinstance(axis, NamedDirection) else name)
        whole = tensors.direction(next(sources[kind]), f"The axis '{names[-1]}'")
        direction = {key: tensor for key, tensor in whole.items() if key not in frozen}
        if kind == "random" and turn:
            direction = orthogonal_to(direction, directions[kinds.index("random")])
        directions.append(direction)
    units = tuple(options.normalize or ("filter" if kind == "random" else "none") for kind in kinds)
    if not as_adam:
        directions = [
            normalized(direction, weights, unit, options.norm, options.biases)
            for direction, unit in zip(directions, units, strict=True)
        ]
    for name, direction in zip(names, directions, strict=True):
        if not any(bool(tensor.any()) for tensor in direction.values()):
            raise FlatnessError(
                f"The axis '{name}' is zero: each of its tensors is frozen, is zero, belongs to weights that are zero, "
                "or is a bias that biases='zero' does not move. To move biases, give biases='scaled'."
            )
    if as_adam and len(directions) == 1:  # Adam's step needs both moments, also along a line
        directions.append({key: tensor.double() for key, tensor in moments[1].items() if key not in frozen})
    return Axes(tuple(names), tuple(directions), units, epsilons if as_adam else None)


def adam_moments(
    optimizer: Any, tensors: NamedTensors, of_step: bool
) -> tuple[tuple[Direction, Direction], dict[str, float]]:
    """Return ``((exp_avg, exp_avg_sq), eps)`` of one or several Adam optimizers, as dicts keyed by parameter name.

    With ``of_step``, return ``max_exp_avg_sq`` instead of ``exp_avg_sq`` for optimizers with ``amsgrad``, because their
    step uses it.
    """
    given = plain(optimizer)
    optimizers = given if isinstance(given, (list, tuple)) else [given]
    if not optimizers or not all(hasattr(each, "param_groups") and hasattr(each, "state") for each in optimizers):
        raise FlatnessError(
            f"axes='adam' takes the moments of an optimizer, but optimizer is a {type(optimizer).__name__}. Give "
            "as optimizer= the torch.optim.Adam (AdamW, NAdam, RAdam) that has trained this model."
        )
    names = {id(tensor): name for name, tensor in tensors.parameters.items()}
    first: Direction = {}
    second: Direction = {}
    epsilons: dict[str, float] = {}
    of_model = [
        (names[id(parameter)], each.state.get(parameter, {}), group)
        for each in optimizers
        for group in each.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    ]
    if not of_model:
        raise FlatnessError(
            "optimizer= does not have the parameters of this model. Give the optimizer that has trained this model."
        )
    for name, state, group in of_model:
        if all(moment in state for moment in MOMENTS):
            first[name], second[name] = (state[moment] for moment in MOMENTS)
            if of_step and group.get("amsgrad"):
                second[name] = state["max_exp_avg_sq"]
            epsilons[name] = float(group.get("eps", 1e-8))
    if not first:
        raise FlatnessError(
            f"The optimizer, {', '.join(type(each).__name__ for each in optimizers)}, keeps no exp_avg and exp_avg_sq: "
            "it is not Adam, or has made no step yet. Give an Adam optimizer that has trained the model, or load its "
            "state dict."
        )
    return (first, second), epsilons
