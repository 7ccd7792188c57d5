"""Add a FlatnessCallback to every Trainer if the environment variable ``LIGHTNING_FLATNESS`` is set."""

from __future__ import annotations

import os

from lightning_flatness.callbacks.base import MeasuringCallback
from lightning_flatness.callbacks.flatness import FlatnessCallback
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer, callbacks_of

VARIABLE = "LIGHTNING_FLATNESS"


def callbacks() -> list[Callback]:
    """Return the callbacks that Lightning adds to every Trainer.

    The list is empty if the environment variable ``LIGHTNING_FLATNESS`` is unset, empty or 0.
    """
    return [] if os.environ.get(VARIABLE, "0") in ("", "0") else [_FromEnvironment(on_error="warn", summary=False)]


class _FromEnvironment(FlatnessCallback):
    """A FlatnessCallback that gives way to the user's own callbacks.

    It removes itself if the Trainer has another FlatnessCallback, or another callback of this package with the same
    prefix.
    """

    gives_way = True

    @property
    def state_key(self) -> str:
        return "FlatnessCallback[environment]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Store the stage, and remove this callback from the Trainer if it must give way."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        measuring = [callback for callback in others if isinstance(callback, MeasuringCallback)]
        if any(isinstance(one, FlatnessCallback) or one.prefix == self.prefix for one in measuring):
            # Assign a new list, since Lightning is iterating over the old one.
            trainer.callbacks = others  # type: ignore[attr-defined]
