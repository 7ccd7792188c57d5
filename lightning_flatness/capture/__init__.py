"""Level 1: everything that touches an ``nn.Module``. It hands tensors down to ``functional`` and leaves no trace."""

from lightning_flatness.capture.isolation import random_states_kept
from lightning_flatness.capture.observer import FlatnessObserver, LayerStatistics
from lightning_flatness.capture.options import MEASURES, Options

__all__ = ["MEASURES", "FlatnessObserver", "LayerStatistics", "Options", "random_states_kept"]
