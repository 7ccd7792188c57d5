"""Which functions take a layer's kernel while a network runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class KernelUses:
    """Records, for the time of a ``with`` block, which functions take certain tensors, in order.

    A kernel that a forward uses outside of its layer shows here, whatever the grad mode. A mode for torch functions
    would slow down every operation of the network, in Python and between operations that fill the caches; so the
    tensors have a class of ours meanwhile, and whatever takes one of them finds them as they are without it.

    Args:
        tensors: by the name of a layer.

    Example:
        >>> kernel = nn.Parameter(torch.ones(2, 3))
        >>> with KernelUses({"fc": kernel}) as uses:
        ...     total = nn.functional.linear(torch.ones(1, 3), kernel) + torch.ones(2)
        >>> uses.found, type(kernel) is nn.Parameter
        ([('fc', 'linear')], True)
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.found: list[tuple[str, str]] = []
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._tensors = list({id(tensor): tensor for tensor in tensors.values()}.values())
        self._mode: _Mode | None = None

    def __enter__(self) -> KernelUses:
        if all(type(tensor) in WATCHED for tensor in self._tensors):
            _active.append(self)
            self.watch()
        else:  # of somebody else's class, or watched already
            self._mode = _Mode(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        elif self in _active:
            _active.remove(self)
            self.leave()

    def watch(self) -> None:
        """Give the tensors a class of ours."""
        for tensor in self._tensors:
            tensor.__class__ = WATCHED[type(tensor)]

    def leave(self) -> None:
        """Give the tensors their own class back."""
        for tensor in self._tensors:
            tensor.__class__ = OWN[type(tensor)]

    def add(self, function: Callable[..., Any], arguments: Iterable[Any]) -> None:
        """Add a call."""
        for argument in arguments:
            for tensor in argument if isinstance(argument, (tuple, list)) else (argument,):
                if id(tensor) in self._names:
                    self.found.append((self._names[id(tensor)], getattr(function, "__name__", str(function))))


_active: list[KernelUses] = []


@contextmanager
def _own_classes() -> Iterator[None]:
    now = list(_active)
    _active.clear()
    for uses in now:
        uses.leave()
    try:
        yield
    finally:
        for uses in now:
            uses.watch()
        _active.extend(now)


class _Watched:
    """What tensors do while they are watched: the same."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], arguments: Any = (), keywords: Any = None
    ) -> Any:
        for uses in _active:
            uses.add(function, (*arguments, *(keywords or {}).values()))
        with _own_classes():
            return function(*arguments, **(keywords or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _own_classes():
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _own_classes():
            return self.__reduce_ex__(protocol)


class _WatchedTensor(_Watched, Tensor):
    pass


class _WatchedParameter(_Watched, nn.Parameter):
    pass


WATCHED: dict[type, type] = {Tensor: _WatchedTensor, nn.Parameter: _WatchedParameter}
OWN = {watched: own for own, watched in WATCHED.items()}


class _Mode(TorchFunctionMode):
    def __init__(self, uses: KernelUses) -> None:
        super().__init__()
        self._uses = uses

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], arguments: Any = (), keywords: Any = None
    ) -> Any:
        self._uses.add(function, (*arguments, *(keywords or {}).values()))
        return function(*arguments, **(keywords or {}))
