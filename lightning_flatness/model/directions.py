"""Compute directions in weight space from several states of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_flatness.checks import check_whole
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, PrincipalDirections, principal_directions
from lightning_flatness.model.copy import measured
from lightning_flatness.model.isolation import without_wrapper
from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.names import plain_name

State = nn.Module | Mapping[str, Tensor]


class NamedDirection(dict[str, Tensor]):
    """A direction together with a name, which labels the axis along the direction."""

    def __init__(self, direction: Direction, name: str) -> None:
        super().__init__(direction)
        self.name = name


def direction_between(model: nn.Module, other: State) -> Direction:
    """Return the direction ``w' - w`` from a model with weights ``w`` to another one with weights ``w'``.

    Both models must have the same architecture. The direction includes parameters and buffers, so the point at
    coordinate 1 is the other model with its own BatchNorm statistics. At other coordinates the statistics are
    interpolated linearly, like the weights. (With ``batch_norm="recomputed"``,
    :func:`~lightning_flatness.loss_landscape` recomputes the statistics at every point.)

    Args:
        model: the model with the weights ``w``.
        other: the other model, or its ``state_dict()``.

    Returns:
        A mapping of names to float64 tensors, for ``axes=`` of :func:`~lightning_flatness.loss_landscape`.

    Raises:
        FlatnessError: tensors are missing in ``other``, have other shapes or are not finite, or the models are equal.

    Example:
        >>> one, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> direction = direction_between(one, other.state_dict())
        >>> bool(((one.bias + direction["bias"]) - other.bias).abs().max() < 1e-6)
        True
    """
    tensors = NamedTensors(model)
    offset = _offset(tensors, other, {**tensors.parameters, **tensors.buffers}, "The other model")
    return tensors.direction(offset, "The direction between the models")


def pca_directions(model: nn.Module, states: Iterable[State], number: int = 2) -> PrincipalDirections:
    """Compute the principal directions (PCA) of the differences between states of a trajectory and ``model``.

    Only parameters are used, because differences of BatchNorm statistics would outweigh those of parameters.

    Args:
        model: the origin, usually the trained model.
        states: models or state dicts along the trajectory.
        number: number of directions.

    Returns:
        A named tuple. Its ``directions`` are orthonormal; pass them in ``axes=`` of
        :func:`~lightning_flatness.loss_landscape`. ``coordinates``, ``(states, number)``, are for ``trajectory=`` of
        landscape figures. ``explained`` is each direction's share of the squared distances between the states and
        ``model``.

    Raises:
        FlatnessError: states do not fit the model or are not finite, or too few of them differ.

    Source:
        Li et al. 2018 (arXiv 1712.09913), Section 7.2.

    Example:
        >>> model, states = nn.Linear(2, 1), [nn.Linear(2, 1).state_dict() for _ in range(3)]
        >>> pca_directions(model, states).coordinates.shape
        torch.Size([3, 2])
    """
    tensors = NamedTensors(model)
    check_whole("number", number, least=1)
    offsets = [
        _offset(tensors, state, tensors.parameters, f"State {index} of the trajectory")
        for index, state in enumerate(states)
    ]
    principal = principal_directions(offsets, number) if len(offsets) >= number else None
    if principal is None or not bool((principal.explained > 1e-12).all()):
        raise FlatnessError(
            f"The {len(offsets)} states of the trajectory do not span {number} directions around the model; give more "
            "states that differ, or a smaller number=."
        )
    shares = [f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %" for share in principal.explained.tolist()]
    names = [f"principal direction {index} ({share})" for index, share in enumerate(shares, start=1)]
    return principal._replace(directions=tuple(map(NamedDirection, principal.directions, names)))


def _offset(tensors: NamedTensors, state: State, wanted: Mapping[str, Tensor], name: str) -> Direction:
    """Return the tensors of ``state`` minus those of the model, in float64, for all names in ``wanted``.

    Buffers that ``state`` lacks are left out. Error messages call the state ``name``.
    """
    if isinstance(state, nn.Module):
        state = without_wrapper(state)
        state = {**dict(state.named_parameters(remove_duplicate=False)), **dict(state.named_buffers())}
    if not isinstance(state, Mapping):
        raise FlatnessError(f"{name} is a {type(state).__name__}; give a model or its state_dict().")
    given = {tensors.first_names.get(plain_name(key), key): value for key, value in state.items()}
    offset: Direction = {}
    for key, tensor in wanted.items():
        if key not in given and key in tensors.buffers:
            continue  # a buffer that is not persistent is not in state dicts
        if key not in given or not isinstance(given[key], Tensor) or given[key].shape != tensor.shape:
            there = f"has shape {tuple(given[key].shape)}" if isinstance(given.get(key), Tensor) else "is missing"
            raise FlatnessError(
                f"{name} does not fit the model: '{key}' {there} there, but has shape {tuple(tensor.shape)} in the "
                "model."
            )
        ours = measured(tensor.detach(), torch.float64)
        theirs = measured(given[key].detach(), torch.float64).to(ours.device)
        for whose, numbers in (("The model", ours), (name, theirs)):
            if not bool(numbers.isfinite().all()):
                raise FlatnessError(
                    f"{whose} has numbers that are not finite, in '{key}'. If training has diverged, take an earlier "
                    "state."
                )
        offset[key] = theirs - ours
    return offset
