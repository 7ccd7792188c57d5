"""Level 1: everything that touches an ``nn.Module``. It hands tensors down to ``functional`` and leaves no trace."""

from lightning_flatness.capture.generators import generators_kept
from lightning_flatness.capture.isolation import isolated, measuring_device, random_states_kept
from lightning_flatness.capture.live import KEEPS_TENSORS, Listener, same_inputs
from lightning_flatness.capture.observer import FlatnessObserver, LayerStatistics
from lightning_flatness.capture.operators import Operator, operators_of
from lightning_flatness.capture.options import MEASURES, Options
from lightning_flatness.capture.passes import ForwardPasses
from lightning_flatness.capture.rows import num_rows

__all__ = [
    "KEEPS_TENSORS",
    "MEASURES",
    "FlatnessObserver",
    "ForwardPasses",
    "LayerStatistics",
    "Listener",
    "Operator",
    "Options",
    "generators_kept",
    "isolated",
    "measuring_device",
    "num_rows",
    "operators_of",
    "random_states_kept",
    "same_inputs",
]
