"""Lightning, under that of its two names by which the user has imported it."""

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
    """Whether it is a LightningModule, of either name.

    Example:
        >>> is_lightning_module(LightningModule())
        True
    """
    return _is_lightning(type(module))  # type: ignore[arg-type]  # mypy does not know that classes have a hash


@lru_cache  # a network has many modules of few classes, and is gone through with every batch
def _is_lightning(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__name__}" in MODULES for base in kind.__mro__)


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether a LightningModule, of either name, has a method of its own.

    Example:
        >>> is_overridden("forward", LightningModule())
        False
    """
    base = next(base for base in type(module).__mro__ if f"{base.__module__}.{base.__name__}" in MODULES)
    return getattr(type(module), method) is not getattr(base, method)


def is_weight_averaging(callback: Any) -> bool:
    """Whether it is Lightning's weight averaging, of either name, or made from it.

    Example:
        >>> is_weight_averaging(Callback())
        False
    """
    return any(base.__name__ == "WeightAveraging" for base in type(callback).__mro__)
