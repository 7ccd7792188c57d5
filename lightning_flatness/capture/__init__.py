"""Level 1: everything that touches an ``nn.Module``. It hands tensors down to ``functional`` and leaves no trace."""

from lightning_flatness.capture.observer import FlatnessObserver, LayerStatistics

__all__ = ["FlatnessObserver", "LayerStatistics"]
