"""Lightning, under that of its two names by which the user has imported it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import EarlyStopping

ROOTS = ("lightning.pytorch", "pytorch_lightning")

__all__ = ["ROOTS", "Callback", "EarlyStopping", "LightningModule", "Trainer", "is_overridden"]


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether a LightningModule, of either name, has a method of its own.

    Example:
        >>> is_overridden("forward", LightningModule())
        False
    """
    base = next(base for base in reversed(type(module).__mro__) if base.__name__ == "LightningModule")
    return getattr(type(module), method) is not getattr(base, method)
