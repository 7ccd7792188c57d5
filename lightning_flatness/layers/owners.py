"""Find the modules that own kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Owner = tuple[str, str]  # name of a module, and name of its parameter


def parameters_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[Owner, nn.Parameter]]:
    """Yield every parameter of ``modules`` with its owner.

    A parameter in an ``nn.ParameterList`` or ``nn.ParameterDict``, which have no forward, belongs to the module above.
    """
    for name, module in modules.items():
        above, _, of_list = name.rpartition(".")
        for key, parameter in module._parameters.items():
            in_list = isinstance(module, (nn.ParameterList, nn.ParameterDict))
            if parameter is not None:
                yield ((above, f"{of_list}.{key}") if in_list else (name, key)), parameter


class Owners:
    """The owners of the parameters that ``modules`` hold now."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        parameters = list(parameters_of(modules))
        self._by_id = {id(parameter): owner for owner, parameter in parameters}
        self._by_memory = {_memory(parameter): owner for owner, parameter in parameters}

    def of(self, tensor: Tensor) -> Owner | None:
        """Return the owner of a parameter; None for any other tensor."""
        return self._by_id.get(id(tensor))

    def of_alias(self, tensor: Tensor) -> Owner | None:
        """Return the owner of the parameter with the same memory, such as ``weight`` for ``weight.data``, or None."""
        memory = _memory(tensor)
        return None if memory is None else self._by_memory.get(memory)


def _memory(tensor: Tensor) -> Any:
    """Return the address, shape and strides of a tensor; None if it has no address, as inside ``torch.func.vmap``."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return None
    return (address, tensor.shape, tensor.stride()) if address else None
