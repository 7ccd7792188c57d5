"""Map names to a model's parameters and buffers, and check directions in the space of these tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction
from lightning_flatness.model.copy import measured, measuring_device, refuse_meta
from lightning_flatness.model.isolation import without_wrapper
from lightning_flatness.model.names import lies_in, listed, plain_name


class NamedTensors:
    """The floating-point ``parameters`` and ``buffers`` of a model, keyed by name, in the order of the model.

    Names are without ``_orig_mod``, which ``torch.compile`` adds. A tensor with several names (a tied one) is listed
    only under its first name; ``first_names`` maps all names of a tensor to the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        model = without_wrapper(model)
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
                    raise FlatnessError(
                        f"'{name}' has no shape yet (a lazy module); call the model once before this measurement."
                    )
                refuse_meta(name, tensor)
                if tensor.is_complex():
                    raise FlatnessError(f"'{name}' holds complex numbers; a landscape needs real numbers.")
                if not tensor.is_floating_point():
                    continue
                self.first_names[name] = first.setdefault(id(tensor), name)
                kind.setdefault(self.first_names[name], tensor)
        if not self.parameters:
            raise FlatnessError("The model has no parameters with floating-point numbers.")

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def frozen(self, patterns: Sequence[str]) -> set[str]:
        """Return the names of the tensors that match one of the ``patterns``, or lie in a module that matches one."""
        names: set[str] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise FlatnessError(f"frozen={pattern!r}: give names or glob patterns of parameters or modules.")
            fitting = {first for name, first in self.first_names.items() if lies_in(pattern, name)}
            if not fitting:
                raise FlatnessError(
                    f"frozen='{pattern}' matches no parameter or buffer and no module that has one. There are: "
                    f"{listed(list(self.first_names))}."
                )
            names |= fitting
        if names >= set(self.parameters):
            raise FlatnessError(f"frozen={list(patterns)} freezes all parameters, so there is nothing to move.")
        return names

    def direction(self, given: Any, name: str) -> Direction:
        """Check a direction that a user gives, and return it as float64 tensors, keyed by name.

        ``given`` is a mapping from names of some parameters or floating-point buffers to tensors. Alternatively, it is
        one tensor with the entries of all parameters, in the order of ``torch.nn.utils.parameters_to_vector``. Error
        messages call the direction ``name``.
        """
        if isinstance(given, Tensor):
            given = self._split(given, name)
        if not isinstance(given, Mapping) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
            raise FlatnessError(
                f"{name} is a {type(given).__name__}; give 'random', 'adam', 'hessian', a mapping from names of "
                "parameters to tensors, or one flat tensor."
            )
        direction: Direction = {}
        for long_name, tensor in given.items():
            first = self.first_names.get(plain_name(str(long_name)))
            if first is None:
                raise FlatnessError(
                    f"{name} has an entry '{long_name}', which is no parameter or floating-point buffer of the model. "
                    f"There are: {listed(list(self.first_names))}."
                )
            if tensor.shape != self[first].shape or tensor.is_complex():
                raise FlatnessError(
                    f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype} for '{long_name}', whose shape is "
                    f"{tuple(self[first].shape)}. Give a real tensor of this shape."
                )
            tensor = measured(tensor.detach(), torch.float64).to(measuring_device(self[first].device))
            if first in direction and not torch.equal(direction[first], tensor):
                raise FlatnessError(
                    f"{name} has different entries for two names of one tensor of the model, '{first}'. Give one of "
                    "the two entries, or equal ones."
                )
            direction[first] = tensor
        if not all(bool(tensor.isfinite().all()) for tensor in direction.values()):
            raise FlatnessError(f"{name} has numbers that are not finite.")
        if not any(bool(tensor.any()) for tensor in direction.values()):
            raise FlatnessError(f"{name} is zero everywhere, so the model does not change along it.")
        return direction

    def _split(self, flat: Tensor, name: str) -> Direction:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        if flat.shape != (sum(sizes),):
            raise FlatnessError(
                f"{name} is a tensor of shape {tuple(flat.shape)}; the model has {sum(sizes)} parameters, so a flat "
                f"tensor must have shape ({sum(sizes)},)."
            )
        parts = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: part.reshape(parameter.shape) for (name, parameter), part in parts}
