"""From what a user asks for to the directions of a landscape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, normalized, orthogonal_to, random_direction
from lightning_flatness.model.named_tensors import NamedDirection, NamedTensors

KINDS = ("random", "adam", "hessian")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Axes(NamedTuple):
    """The axes of a line or plane, ready to use."""

    names: tuple[str, ...]
    directions: tuple[Direction, ...]
    units: tuple[str, ...]  # of the normalisation, of each
    epsilons: dict[str, float] | None  # of Adam's update


def as_list(axes: Any) -> list[Any]:
    """The axes one by one; a word alone is a plane of two axes of that kind, a direction alone a line.

    Raises:
        FlatnessError: not one or two axes, or an unknown word.

    Example:
        >>> as_list("random"), as_list(["adam"])
        (['random', 'random'], ['adam'])
    """
    if isinstance(axes, str):
        axes = [axes, axes]
    elif isinstance(axes, (Mapping, Tensor)):
        axes = [axes]
    if not isinstance(axes, Sequence) or not 1 <= len(axes) <= 2:
        raise FlatnessError(
            f"axes is a {type(axes).__name__}{f' of length {len(axes)}' if isinstance(axes, Sequence) else ''}; give "
            "'random', 'adam' or 'hessian' for a plane, or a list of one or two of these words or directions."
        )
    for axis in axes:
        if isinstance(axis, str) and axis not in KINDS:
            raise FlatnessError(f"axes={axis!r} is not known; there are {', '.join(map(repr, KINDS))}.")
    return list(axes)


def check_update(update: str, wanted: Sequence[Any], normalize: str | None) -> None:
    """Adam's update has axes of its own.

    Raises:
        FlatnessError: others are wanted, or a normalisation.

    Example:
        >>> check_update("adam", ["adam"], None)
    """
    others = not all(isinstance(axis, str) and axis == "adam" for axis in wanted)
    if update == "adam" and (others or normalize not in (None, "none")):
        raise FlatnessError("update='adam' takes axes='adam' or axes=['adam'], and no normalisation.")


def find_axes(
    wanted: Sequence[Any],
    tensors: NamedTensors,
    weights: Mapping[str, Tensor],
    frozen: set[str],
    *,
    normalize: str | None,
    norm: int,
    biases: Any,
    update: str,
    optimizer: Any,
    seed: int,
    eigenvectors: Callable[[int], Sequence[Any]],
) -> Axes:
    """Directions for the axes, without what is frozen, normalised. The i-th mention of a kind is its i-th direction.

    Args:
        wanted: from :func:`as_list`.
        tensors: of the model.
        weights: its parameters and buffers in the precision they are measured in, by name.
        frozen: names that do not move.
        normalize: unit; by default ``"filter"`` for random axes and ``"none"`` for others.
        norm: order.
        biases: see :func:`~lightning_flatness.functional.normalized`.
        update: ``"add"`` or ``"adam"``.
        optimizer: with Adam's moments.
        seed: of random directions.
        eigenvectors: of the Hessian, as many as are asked for.

    Raises:
        FlatnessError: see :func:`~lightning_flatness.loss_landscape`.
    """
    kinds = [axis if isinstance(axis, str) else "given" for axis in wanted]
    check_update(update, wanted, normalize)
    generator = torch.Generator().manual_seed(seed)
    moments: Sequence[Direction] = ()
    epsilons: dict[str, float] | None = None
    if "adam" in kinds:
        moments, epsilons = adam_moments(optimizer, tensors, of_step=update == "adam")
    hessian = eigenvectors(kinds.count("hessian")) if "hessian" in kinds else ()
    names: list[str] = []
    directions: list[Direction] = []
    for index, (axis, kind) in enumerate(zip(wanted, kinds, strict=True)):
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
    units = tuple(normalize or ("filter" if kind == "random" else "none") for kind in kinds)
    if update != "adam":
        directions = [normalized(d, weights, unit, norm, biases) for d, unit in zip(directions, units, strict=True)]
    for name, direction in zip(names, directions, strict=True):
        _check_moves(name, direction)
    if update == "adam" and len(directions) == 1:  # along a line, too, Adam's step takes both moments
        directions.append({key: tensor.double() for key, tensor in moments[1].items() if key not in frozen})
    return Axes(tuple(names), tuple(directions), units, epsilons if update == "adam" else None)


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
