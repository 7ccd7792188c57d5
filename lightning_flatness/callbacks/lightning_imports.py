"""Lightning, imported under the name that the user has imported: ``lightning.pytorch`` or ``pytorch_lightning``."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import EarlyStopping

ROOTS = ("lightning.pytorch", "pytorch_lightning")
MODULES = tuple(f"{root}.core.module.LightningModule" for root in ROOTS)

__all__ = [
    "ROOTS",
    "Callback",
    "EarlyStopping",
    "LightningModule",
    "Trainer",
    "is_lightning_module",
    "is_overridden",
    "is_weight_averaging",
]


def is_lightning_module(module: Any) -> bool:
    """Whether a module is a LightningModule of either name."""
    return _is_lightning(type(module))  # type: ignore[arg-type]  # mypy does not know that classes have a hash


@lru_cache  # asked for every module of a network with every batch; modules are of few classes
def _is_lightning(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__name__}" in MODULES for base in kind.__mro__)


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether a LightningModule of either name overrides a method."""
    base = next(base for base in type(module).__mro__ if f"{base.__module__}.{base.__name__}" in MODULES)
    return getattr(type(module), method) is not getattr(base, method)


def is_weight_averaging(callback: Any) -> bool:
    """Whether a callback is Lightning's ``WeightAveraging`` of either name, or a subclass."""
    return any(base.__name__ == "WeightAveraging" for base in type(callback).__mro__)
