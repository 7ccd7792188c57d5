"""Level 3: Lightning's hooks, without mathematics."""

from lightning_flatness.callbacks.flatness_callback import FlatnessCallback
from lightning_flatness.callbacks.flatness_stopping import FlatnessStopping

__all__ = ["FlatnessCallback", "FlatnessStopping"]
