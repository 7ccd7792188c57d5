"""The tensors of a model that a landscape can move, by name; and directions between states of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.checks import check_whole
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, PrincipalDirections, principal_directions
from lightning_flatness.model.copy import measured, measuring_device
from lightning_flatness.model.names import lies_in, plain_name

State = nn.Module | Mapping[str, Tensor]


class NamedDirection(dict[str, Tensor]):
    """A direction that says what an axis along it is called."""

    def __init__(self, direction: Direction, name: str) -> None:
        super().__init__(direction)
        self.name = name


class NamedTensors:
    """Parameters and floating-point buffers of a model, each once under its first name, without ``_orig_mod.``.

    Attributes:
        parameters: in the order of ``model.parameters()``.
        buffers: those with floating-point numbers.
        first_names: of every name, the one under which the tensor is found here.

    Raises:
        FlatnessError: no parameters, complex ones, or ones whose shape is not known yet.

    Example:
        >>> list(NamedTensors(nn.BatchNorm1d(2)).buffers)
        ['running_mean', 'running_var']
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise FlatnessError(f"The model is a {type(model).__name__}; give a torch.nn.Module.")
        first: dict[int, str] = {}
        self.first_names: dict[str, str] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        for kind, named in (
            (self.parameters, model.named_parameters(remove_duplicate=False)),
            (self.buffers, model.named_buffers(remove_duplicate=False)),
        ):
            for long_name, tensor in named:
                name = plain_name(long_name)
                if nn.parameter.is_lazy(tensor):
                    raise FlatnessError(f"'{name}' has no shape yet (a lazy module); call the model once before.")
                if tensor.is_complex():
                    raise FlatnessError(f"'{name}' holds complex numbers; only real ones have a landscape here.")
                if not tensor.is_floating_point():
                    continue
                self.first_names[name] = first.setdefault(id(tensor), name)
                kind.setdefault(self.first_names[name], tensor)
        if not self.parameters:
            raise FlatnessError("The model has no parameters with floating-point numbers.")

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def frozen(self, patterns: Sequence[str]) -> set[str]:
        """Names of tensors that, or whose module, one of the patterns fits.

        Raises:
            FlatnessError: a pattern is no string or fits nothing, or all parameters are frozen.

        Example:
            >>> sorted(NamedTensors(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))).frozen(["0", "*.bias"]))
            ['0.bias', '0.weight', '1.bias']
        """
        found: set[str] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise FlatnessError(f"frozen={pattern!r}: give names or glob patterns of parameters or modules.")
            fitting = {first for name, first in self.first_names.items() if lies_in(pattern, name)}
            if not fitting:
                raise FlatnessError(f"frozen='{pattern}' fits nothing; there are {', '.join(self.first_names)}.")
            found |= fitting
        if found >= set(self.parameters):
            raise FlatnessError(f"frozen={list(patterns)} freezes all parameters, so there is nothing to move.")
        return found

    def direction(self, given: Any, name: str) -> Direction:
        """A direction as a user gives it: tensors by name, or all parameters as one flat tensor.

        Args:
            given: a mapping from names of parameters or floating-point buffers, of which any may be missing; or a
                tensor with a number for every parameter, in the order of ``torch.nn.utils.parameters_to_vector``.
            name: of the direction, for messages.

        Raises:
            FlatnessError: other names, shapes or types; numbers that are not finite; all of them zero.
        """
        if isinstance(given, Tensor):
            given = self._split(given, name)
        if not isinstance(given, Mapping) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
            raise FlatnessError(
                f"{name} is a {type(given).__name__}; give 'random', 'adam', 'hessian', a mapping from names of "
                "parameters to tensors, or one flat tensor."
            )
        found: Direction = {}
        for long_name, tensor in given.items():
            first = self.first_names.get(plain_name(str(long_name)))
            if first is None:
                raise FlatnessError(
                    f"{name} has an entry '{long_name}', which is no parameter or floating-point buffer of the model; "
                    f"there are {', '.join(self.first_names)}."
                )
            if tensor.shape != self[first].shape or tensor.is_complex():
                raise FlatnessError(
                    f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype} for '{long_name}', whose shape is "
                    f"{tuple(self[first].shape)}."
                )
            tensor = measured(tensor.detach(), torch.float64).to(measuring_device(self[first].device))
            if first in found and not torch.equal(found[first], tensor):
                raise FlatnessError(f"{name} has two different entries for one tensor of the model, '{first}'.")
            found[first] = tensor
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            raise FlatnessError(f"{name} has numbers that are not finite.")
        if not any(bool(tensor.any()) for tensor in found.values()):
            raise FlatnessError(f"{name} is zero everywhere, so there is nothing to see along it.")
        return found

    def _split(self, flat: Tensor, name: str) -> Direction:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        if flat.shape != (sum(sizes),):
            raise FlatnessError(
                f"{name} is a tensor of shape {tuple(flat.shape)}; the model has {sum(sizes)} parameters, so a flat "
                f"one has shape ({sum(sizes)},)."
            )
        parts = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: part.reshape(parameter.shape) for (name, parameter), part in parts}


def direction_between(model: nn.Module, other: State) -> Direction:
    """The direction from a model to another one of the same architecture: ``w' - w`` for parameters and buffers.

    The other model lies at 1 along it, its BatchNorm statistics too. (Between the two, and beyond, statistics are on
    the straight line as well; ``batch_norm="recomputed"`` makes them those of the weights at every point.)

    Args:
        model: at 0, the model whose landscape is wanted.
        other: a model or its ``state_dict()``.

    Returns:
        float64 tensors by name, for ``axes=`` of :func:`~lightning_flatness.loss_landscape`.

    Raises:
        FlatnessError: tensors are missing in ``other``, have other shapes or are not finite, or nothing differs.

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
    """The directions in which a trajectory differs most from the model where it ends, by PCA; and the trajectory there.

    The directions are orthonormal, the origin is the model. Only parameters count: BatchNorm statistics would drown
    them.

    Args:
        model: the origin, usually the trained model.
        states: models or state dicts along the way; the model itself may be among them.
        number: of directions.

    Returns:
        ``directions`` for ``axes=`` of :func:`~lightning_flatness.loss_landscape`, where such an axis is called
        ``"principal direction 1 (63 %)"``; ``coordinates`` ``(states, number)`` for ``trajectory=`` of the figures;
        ``explained``, their shares of the squared distances.

    Raises:
        FlatnessError: states that do not fit or are not finite, or too few that differ.

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
    found = principal_directions(offsets, number) if len(offsets) >= number else None
    if found is None or not bool((found.explained > 1e-12).all()):
        raise FlatnessError(
            f"The {len(offsets)} states of the trajectory do not span {number} directions around the model; give more "
            "states that differ, or a smaller number=."
        )
    shares = [f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %" for share in found.explained.tolist()]
    names = [f"principal direction {index} ({share})" for index, share in enumerate(shares, start=1)]
    return found._replace(directions=tuple(map(NamedDirection, found.directions, names)))


def _offset(tensors: NamedTensors, state: State, wanted: Mapping[str, Tensor], name: str) -> Direction:
    """``state`` minus the model, float64."""
    if isinstance(state, nn.Module):
        state = {**dict(state.named_parameters(remove_duplicate=False)), **dict(state.named_buffers())}
    if not isinstance(state, Mapping):
        raise FlatnessError(f"{name} is a {type(state).__name__}; give a model or its state_dict().")
    given = {tensors.first_names.get(plain_name(key), key): value for key, value in state.items()}
    offset: Direction = {}
    for key, tensor in wanted.items():
        if key not in given and key in tensors.buffers:
            continue  # not kept in state dicts
        if key not in given or not isinstance(given[key], Tensor) or given[key].shape != tensor.shape:
            found = f"has shape {tuple(given[key].shape)}" if isinstance(given.get(key), Tensor) else "is missing"
            raise FlatnessError(f"{name} does not fit the model: '{key}' of shape {tuple(tensor.shape)} {found} there.")
        ours = measured(tensor.detach(), torch.float64)
        theirs = measured(given[key].detach(), torch.float64).to(ours.device)
        for whose, numbers in (("The model", ours), (name, theirs)):
            if not bool(numbers.isfinite().all()):
                raise FlatnessError(f"{whose} has numbers that are not finite, in '{key}'.")
        offset[key] = theirs - ours
    return offset
