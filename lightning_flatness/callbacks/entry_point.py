"""Adds a FlatnessCallback to every Trainer if the environment variable ``LIGHTNING_FLATNESS`` is set to 1."""

from __future__ import annotations

import os

from lightning_flatness.callbacks.flatness import FlatnessCallback
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer

VARIABLE = "LIGHTNING_FLATNESS"


def callbacks() -> list[Callback]:
    """Return the callbacks for Lightning to add to every Trainer: none if the variable is unset, empty or 0."""
    return [] if os.environ.get(VARIABLE, "0") in ("", "0") else [_FromEnvironment(on_error="warn", summary=False)]


class _FromEnvironment(FlatnessCallback):
    """A FlatnessCallback that removes itself from a Trainer that already has a FlatnessCallback."""

    @property
    def state_key(self) -> str:
        return "FlatnessCallback[environment]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Store the stage, and remove this callback if the Trainer has another FlatnessCallback."""
        super().setup(trainer, pl_module, stage)
        registered: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, FlatnessCallback) and callback is not self for callback in registered):
            # Assign a new list, since Lightning is iterating over the old one.
            trainer.callbacks = [callback for callback in registered if callback is not self]  # type: ignore[attr-defined]
