"""A callback in every Trainer of the environment, for those who ask for it with ``LIGHTNING_FLATNESS=1``."""

from __future__ import annotations

import os

from lightning_flatness.callbacks.flatness import FlatnessCallback
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer

VARIABLE = "LIGHTNING_FLATNESS"


def callbacks() -> list[Callback]:
    """What Lightning adds to every Trainer: nothing, unless the environment variable is set to something but 0.

    Example:
        >>> callbacks()
        []
    """
    return [] if os.environ.get(VARIABLE, "0") in ("", "0") else [_FromEnvironment(on_error="warn", summary=False)]


class _FromEnvironment(FlatnessCallback):
    """Steps back where the Trainer has a FlatnessCallback already."""

    @property
    def state_key(self) -> str:
        return "FlatnessCallback[environment]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave, if there is another."""
        super().setup(trainer, pl_module, stage)
        registered: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, FlatnessCallback) and callback is not self for callback in registered):
            # Another list, as Lightning is running through this one.
            trainer.callbacks = [callback for callback in registered if callback is not self]  # type: ignore[attr-defined]
