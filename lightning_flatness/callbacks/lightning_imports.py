"""Import Lightning from the package that the user has imported: ``lightning.pytorch`` or ``pytorch_lightning``."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

ROOTS = ("lightning.pytorch", "pytorch_lightning")
MODULES = tuple(f"{root}.core.module.LightningModule" for root in ROOTS)

__all__ = [
    "ROOTS",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LightningModule",
    "ModelCheckpoint",
    "Trainer",
    "callbacks_of",
    "is_lightning_module",
    "is_overridden",
]


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer. Lightning does not annotate this attribute."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def is_lightning_module(module: Any) -> bool:
    """Return whether a module is a LightningModule of ``lightning.pytorch`` or of ``pytorch_lightning``."""
    return _is_lightning(type(module))  # type: ignore[arg-type]  # mypy does not know that classes have a hash


@lru_cache  # called for every module and batch, but with few different classes
def _is_lightning(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__name__}" in MODULES for base in kind.__mro__)


def is_overridden(method: str, module: LightningModule) -> bool:
    """Return whether a LightningModule, of either package, overrides a method of its base class."""
    base = next(base for base in type(module).__mro__ if f"{base.__module__}.{base.__name__}" in MODULES)
    return getattr(type(module), method) is not getattr(base, method)
