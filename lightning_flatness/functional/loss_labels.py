"""Labels of losses, which tell losses with different options apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import getclosurevars, ismethod
from itertools import count
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHOWN_WEIGHTS = 4  # longer class weights are shown as the first three and a hash
DEPTH = 6  # objects that are nested more deeply are not told apart
MOST_OBJECTS = 10_000  # nor are those after the first ones, in a large object such as a Trainer


def with_hash(name: str, loss: Any) -> str:
    """Return ``name``. If other losses may share it, add a hash of the code, options and tensors of ``loss``.

    A function at the top level of a module gets no hash. A lambda, a nested function, a method, or an object with
    attributes gets one. Of torch modules with parameters, only the class is compared, because training changes the
    parameters.

    Example:
        >>> with_hash("wrong", lambda f, y: f[:, 0]) == with_hash("wrong", lambda f, y: f[:, 1])
        False
    """
    if isinstance(loss, FunctionType) and "<" not in loss.__qualname__:
        return name
    try:
        content = content_of(loss)
    except Exception:  # a label is no reason to stop: an object may have attributes that cannot be read
        return name
    return name if content == _type_of(loss) else f"{name} #{_hash(content)}"


def weights_text(weights: Sequence[float]) -> str:
    """Return class weights as a short text.

    Example:
        >>> weights_text([1.0, 0.5])
        '[1, 0.5]'
    """
    texts = [f"{weight:g}" for weight in weights]
    if len(texts) <= SHOWN_WEIGHTS:
        return f"[{', '.join(texts)}]"
    return f"[{', '.join(texts[:3])}, ... #{_hash(texts)}]"


def content_of(value: Any, depth: int = DEPTH, objects: Iterator[int] | None = None) -> Any:
    """Return the code, attributes and entries of an object as strings, tuples and lists, the same in every process.

    ``objects`` counts the objects that have been looked at.
    """
    counted = count() if objects is None else objects
    if not depth or next(counted) >= MOST_OBJECTS:
        return _type_of(value)

    def inner(one: Any) -> Any:
        return content_of(one, depth - 1, counted)

    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return repr(value)
    if isinstance(value, Tensor):
        entries = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), hashlib.sha256(entries.numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (list, tuple)):
        return [inner(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(inner(one)) for one in value)
    if isinstance(value, Mapping):
        return [(str(key), inner(one)) for key, one in value.items()]
    if isinstance(value, CodeType):
        return repr(value.co_code), value.co_names, inner(value.co_consts)
    if isinstance(value, FunctionType):
        variables = getclosurevars(value).nonlocals
        return inner(value.__code__), inner(variables), inner([value.__defaults__, value.__kwdefaults__])
    if ismethod(value):
        return inner(value.__func__), inner(value.__self__)
    if isinstance(value, partial):
        return inner([value.func, value.args, value.keywords])
    if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
        return _type_of(value)  # training changes its parameters, but the label must stay
    attributes = {key: one for key, one in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    if isinstance(value, nn.Module):
        attributes |= dict(value.named_buffers()) | dict(value.named_children())
        attributes.pop("training", None)  # TorchScript modules have none
    return (_type_of(value), inner(attributes)) if attributes else _type_of(value)


def _type_of(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _hash(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:6]
