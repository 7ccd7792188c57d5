"""Level 1: everything that touches an ``nn.Module``. It hands tensors down to ``functional`` and leaves no trace."""

from lightning_flatness.capture.isolation import random_states_kept
from lightning_flatness.capture.observer import FlatnessObserver, LayerStatistics, check_arguments

__all__ = ["FlatnessObserver", "LayerStatistics", "check_arguments", "random_states_kept"]
