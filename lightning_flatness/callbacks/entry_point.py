"""A FlatnessCallback in every Trainer, where the environment variable ``LIGHTNING_FLATNESS=1`` asks for it."""

from __future__ import annotations

import os

from lightning_flatness.callbacks.flatness import FlatnessCallback
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer

VARIABLE = "LIGHTNING_FLATNESS"


def callbacks() -> list[Callback]:
    """Return the callbacks that Lightning adds to every Trainer: none if the variable is unset, empty or 0."""
    return [] if os.environ.get(VARIABLE, "0") in ("", "0") else [_FromEnvironment(on_error="warn", summary=False)]


class _FromEnvironment(FlatnessCallback):
    """Leaves a Trainer that has another FlatnessCallback."""

    @property
    def state_key(self) -> str:
        return "FlatnessCallback[environment]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the stage; leave the Trainer if it has another FlatnessCallback."""
        super().setup(trainer, pl_module, stage)
        registered: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, FlatnessCallback) and callback is not self for callback in registered):
            # A new list, since Lightning is iterating over the old one.
            trainer.callbacks = [callback for callback in registered if callback is not self]  # type: ignore[attr-defined]
