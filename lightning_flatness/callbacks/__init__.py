"""Level 3: Lightning's hooks, without mathematics."""

from lightning_flatness.callbacks.flatness_callback import FlatnessCallback
from lightning_flatness.callbacks.flatness_stopping import FlatnessStopping
from lightning_flatness.callbacks.landscape_callback import LandscapeCallback
from lightning_flatness.callbacks.spectrum_callback import SpectrumCallback

__all__ = ["FlatnessCallback", "FlatnessStopping", "LandscapeCallback", "SpectrumCallback"]
