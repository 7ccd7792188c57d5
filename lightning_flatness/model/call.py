"""Calls of a network: their arguments, and a way to intercept the calls that the user's code makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_flatness.checks import is_sequence
from lightning_flatness.functional.conditions import same_values
from lightning_flatness.model.precision import Precision, current_precision

if TYPE_CHECKING:
    from lightning_flatness.model.answer import Answer


class Call(NamedTuple):
    """The arguments and the precision of one call of a network, and an :class:`Answer` with the returned logits.

    Example:
        >>> as_call({"x": 1}).keywords, as_call([1, 2]).arguments, as_call(1).arguments
        ({'x': 1}, (1, 2), (1,))
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    precision: Precision | None = None  # None unless the user's code made the call
    answer: Answer | None = None  # what the network answered; None if passes of our own are not compared with this call

    def copied(self) -> Call:
        """Return the same call on copies of its tensors, or on the tensors themselves if they cannot be copied."""
        try:
            copied: Call = map_tensors(self, torch.clone)
        except Exception:  # the user's step is running, and must not fail here
            return self
        return copied


def as_call(inputs: Any) -> Call:
    """Return a :class:`Call` with ``inputs`` as its arguments.

    ``inputs`` is a tensor, a sequence of arguments, or a mapping of keyword arguments. A :class:`Call` is returned
    unchanged.
    """
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(tuple(inputs) if is_sequence(inputs) else (inputs,), {})


def heard_call(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
    """Return a :class:`Call` with the arguments that the user's code gives to a network, and the current precision.

    Tensors are not copied.
    """
    return Call(arguments, keywords, current_precision())


def same_inputs(one: Any, other: Any) -> bool:
    """Return whether two inputs, as :func:`as_call` takes them, consist of the very same objects."""
    return _agree(one, other, lambda a, b: a is b)


def equal_inputs(one: Any, other: Any) -> bool:
    """Return whether two inputs, as :func:`as_call` takes them, consist of equal tensors and equal other objects."""
    return _agree(one, other, _equal)


def same_tensors(call: Call, inputs: Any, targets: Tensor | None) -> bool:
    """Return whether a call has the tensors of ``inputs``, in this order, and no other tensors except ``targets``."""
    called, given = tensors_of(call), tensors_of(inputs)
    if targets is not None:
        called = [tensor for tensor in called if tensor.shape != targets.shape or not _equal(tensor, targets)]
    return len(called) == len(given) and all(map(_equal, called, given))


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors in a collection of values."""
    tensors: list[Tensor] = []
    map_tensors(values, tensors.append)
    return tensors


class _KindOfFrozen(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen  # type: ignore[attr-defined]


class _Frozen(metaclass=_KindOfFrozen):
    """For ``isinstance``: every object of a frozen dataclass counts as an instance of this class.

    ``apply_to_collection`` cannot replace the fields of frozen dataclasses, so :func:`map_tensors` does it.
    """


def map_tensors(values: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return ``values`` with every tensor replaced by ``function(tensor)``.

    Tensors are found in tuples, lists, mappings and dataclasses, also frozen ones.
    """

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        result = copy.copy(value)
        for field in fields(value):
            object.__setattr__(result, field.name, map_tensors(getattr(value, field.name), function))
        return result

    return apply_to_collection(values, (Tensor, _Frozen), of)


def _agree(one: Any, other: Any, agree: Callable[[Any, Any], bool]) -> bool:
    if isinstance(one, Call) and isinstance(other, Call):
        one, other = one[:2], other[:2]
    if is_sequence(one) and is_sequence(other):
        return len(one) == len(other) and all(_agree(a, b, agree) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_agree(one[key], other[key], agree) for key in one)
    if is_dataclass(one) and not isinstance(one, type) and type(one) is type(other):
        return all(_agree(getattr(one, field.name), getattr(other, field.name), agree) for field in fields(one))
    return agree(one, other)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and same_values(one, other)
    if one is other or type(one) is not type(other) or isinstance(one, Tensor):
        return one is other
    if getattr(one, "shape", None) != getattr(other, "shape", None):
        return False
    try:
        equal = one == other
        return bool(equal.all() if hasattr(equal, "all") else equal)  # arrays are compared entry by entry
    except RuntimeError:  # objects that compare tensors
        return False


class Hear(Protocol):
    """The type of a function that runs in place of a module's forward and has to call the original forward."""

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Call ``forward``, and return what the module's call shall return."""


class Overheard:
    """A context manager that intercepts the calls of some modules: inside the block, ``hear`` replaces their forward.

    ``hear`` also runs when the user's code calls ``forward`` directly, which hooks do not see. In a compiled module,
    ``hear`` wraps the call of the compiled code, never a part of that code. Forward passes that this package makes
    itself are intercepted only where :func:`only_heard_by` allows it.
    """

    # A stack with one entry for every only_heard_by block that is running. Only the object on top intercepts calls. If
    # None is on top, no object does. If the stack is empty, all objects do.
    _only: ClassVar[list[Overheard | None]] = []
    num_traced: ClassVar[int] = 0  # number of intercepted calls that a compiler has traced, so far

    def __init__(self, modules: Iterable[nn.Module], hear: Hear) -> None:
        self._modules, self._hear = list(modules), hear

    def __enter__(self) -> Overheard:
        for module in self._modules:
            attribute = _attribute(module)
            if not isinstance(vars(module).get(attribute), _Forward):
                vars(module)[attribute] = _Forward(module, attribute)
            vars(module)[attribute].hearers.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._modules:
            for attribute in ATTRIBUTES:  # both: the module may have been compiled inside the block
                forward = vars(module).get(attribute)
                if isinstance(forward, _Forward) and self in forward.hearers:
                    forward.hearers.remove(self)
                    if not forward.hearers:
                        forward.put_back()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block, put the original forward back, so that a compiler sees the user's own modules."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def hear(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Handle one call of a module, and return its output.

        Call the function ``hear`` that was given on creation. Run the original forward instead if a compiler is tracing
        the call, or if this object may not intercept calls now (:func:`only_heard_by`).
        """
        if torch.compiler.is_compiling():
            count_traced()
            return forward(*arguments, **keywords)
        if Overheard._only and Overheard._only[-1] is not self:
            return forward(*arguments, **keywords)
        return self._hear(module, forward, arguments, keywords)


# torch.compile runs a function with this decorator once, when it traces the call.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def count_traced() -> int:
    """Count a call that a compiler traces, in :attr:`Overheard.num_traced`, and return the new number."""
    Overheard.num_traced += 1
    return Overheard.num_traced


ATTRIBUTES = ("_compiled_call_impl", "forward")


def _attribute(module: nn.Module) -> str:
    """Return the name of the attribute that a call of a module runs: compiled code if there is any, or ``forward``."""
    compiled, forward = ATTRIBUTES
    return compiled if vars(module).get(compiled) else forward


@contextmanager
def only_heard_by(overheard: Overheard | None) -> Iterator[None]:
    """Inside the block, let only ``overheard`` intercept calls. If it is None, let no object intercept calls.

    This package runs its own forward passes inside such a block, so that they do not count as calls by the user's code.
    """
    Overheard._only.append(overheard)
    try:
        yield
    finally:
        Overheard._only.pop()


class _Forward:
    """Replaces a module's forward while calls are intercepted. Copying or pickling it gives the original forward."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.hearers: list[Overheard] = []
        self._module, self._attribute = module, attribute
        self._own = {name: value for name, value in vars(module).items() if name == attribute}
        self.__wrapped__ = getattr(module, attribute)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        forward = self.__wrapped__
        for overheard in self.hearers:
            forward = partial(_heard, overheard, self._module, forward)
        return forward(*arguments, **keywords)

    def put_back(self) -> None:
        del vars(self._module)[self._attribute]
        vars(self._module).update(self._own)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "__wrapped__"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        if getattr(self.__wrapped__, "__self__", None) is self._module:
            return getattr, (self._module, "forward")
        return _itself, (self.__wrapped__,)


def _heard(overheard: Overheard, module: nn.Module, forward: Any, /, *arguments: Any, **keywords: Any) -> Any:
    return overheard.hear(module, forward, arguments, keywords)


def _itself(forward: Any) -> Any:
    return forward
