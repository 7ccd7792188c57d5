"""Choose the modules whose calls a step is watched for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_flatness.callbacks.lightning_imports import LightningModule
from lightning_flatness.model.generators import parts_of


def eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its submodules, except for submodules within a compiled module."""
    yield module
    if not is_compiled(module) and "_orig_mod" not in dict(module.named_children()):
        for child in module.children():
            yield from eager_modules(child)


def modules_outside(pl_module: LightningModule) -> list[nn.Module]:
    """Return modules that a LightningModule holds in other ways than as submodules, e.g. in a list.

    Leave out modules without weights of their own, such as wrappers of submodules.
    """
    inside, weights = set(pl_module.modules()), set(pl_module.parameters())
    found = [part for part in parts_of(pl_module) if isinstance(part, nn.Module) and part not in inside]
    parts = {part for module in found for child in module.children() for part in child.modules()}
    eager = dict.fromkeys(part for module in found if module not in parts for part in eager_modules(module))
    return [module for module in eager if not weights.issuperset(module.parameters())]


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` has compiled a module in place."""
    return vars(module).get("_compiled_call_impl") is not None


def is_compiled_around(module: nn.Module, part: nn.Module) -> bool:
    """Return whether a module is compiled in place and contains ``part``, which is another module."""
    return is_compiled(module) and module is not part and part in module.modules()
