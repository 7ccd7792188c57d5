"""Find, restore and seed the random generators that a data set, a model or a loss holds."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

# Longer lists, tuples and dictionaries count as data and are not searched.
MOST_PARTS = 100
# How many attributes or entries deep an object is searched.
DEEPEST = 8
# Types whose objects hold no generator.
PLAIN = frozenset([bool, int, float, str, bytes, type(None), Tensor, nn.Parameter])
MAPPINGS = frozenset([dict, OrderedDict])
# Attributes of a module with its parameters, buffers and submodules, which are found in other ways.
REGISTERED = frozenset(["_parameters", "_buffers", "_modules"])
# Packages whose objects are not searched, except modules (``nn.Module``) and data sets.
OTHERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


@contextmanager
def generators_kept(owner: Any) -> Iterator[None]:
    """On leaving, restore the states of all generators that an object holds, directly or through other objects.

    The search covers generators of torch, numpy and Python in the attributes of the object and, if it is a module, in
    the attributes of its submodules. Short lists, tuples and dictionaries among these attributes are also searched.
    """
    restore = [restoring(generator) for generator in _generators(owner)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def seed_generators(owner: Any, seed: int) -> None:
    """Seed all generators that an object holds, directly or through other objects."""
    for generator in _generators(owner):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif hasattr(generator, "bit_generator"):  # numpy.random.Generator
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed)  # random.Random, numpy.random.RandomState


def drawing(batches: Any) -> list[Any]:
    """Return the parts of a data loader that may hold a ``torch.Generator``, for :func:`generators_kept`."""
    names = ("dataset", "generator", "sampler", "batch_sampler", "collate_fn")
    parts = [batches, *(getattr(batches, name, None) for name in names)]
    parts.append(getattr(parts[-1], "__self__", None))  # whose method collate_fn may be
    return parts + [getattr(part, "generator", None) for part in parts]


def held_by(function: Any) -> list[Any]:
    """Return a function, and what it holds and may draw from, for :func:`generators_kept`.

    A function holds its defaults and the variables of enclosing functions that it uses. A method holds its object, and
    a partial function the arguments that it was given.
    """
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]  # the new cell is empty
    held += [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    held += [getattr(function, "args", None), getattr(function, "keywords", None), getattr(function, "func", None)]
    return [function, getattr(function, "__self__", None), *held]


def restoring(generator: Any) -> Callable[[], Any]:
    """Return a function that puts a generator back into the state that it has now."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):  # numpy.random.Generator
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())  # torch.Generator, numpy.random.RandomState


def _generators(owner: Any) -> list[Any]:
    """Return all generators that an object holds."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    # A SystemRandom has no state.
    return [part for part in parts_of(owner) if isinstance(part, kinds) and not isinstance(part, random.SystemRandom)]


def parts_of(owner: Any) -> Iterator[Any]:
    """Yield an object and the objects that it holds, each once. Search ``DEEPEST`` attributes or entries deep."""
    visited: set[int] = set()
    waiting = [(owner, 0)]
    while waiting:
        part, depth = waiting.pop()
        # Most attributes of modules are flags and empty mappings of hooks: for speed, they are skipped first.
        if type(part) in PLAIN or (type(part) in MAPPINGS and not part) or id(part) in visited or depth > DEEPEST:
            continue
        visited.add(id(part))
        yield part
        waiting += [(inner, depth + 1) for inner in _parts(part)]


def _parts(part: Any) -> list[Any]:
    """Return those attributes or entries of an object that are searched.

    The list is empty for most objects whose type is from Python's standard library or from torch.
    """
    if isinstance(part, (dict, list, tuple)):
        return list(part.values() if isinstance(part, dict) else part) if len(part) <= MOST_PARTS else []
    if isinstance(part, nn.Module):
        modules = list(part.modules()) if not isinstance(part, torch.jit.ScriptModule) else []
        return [value for module in modules for name, value in vars(module).items() if name not in REGISTERED]
    if isinstance(part, (type, ModuleType, Tensor)):
        return []
    root = type(part).__module__.partition(".")[0]
    if root in OTHERS or (root in sys.stdlib_module_names and not isinstance(part, SimpleNamespace)):
        return list(vars(part).values()) if isinstance(part, Dataset) else []
    return list(getattr(part, "__dict__", {}).values())
