"""Level 1: everything that touches an ``nn.Module``. It hands tensors down to ``functional`` and leaves no trace."""

from lightning_flatness.capture.generators import drawing, generators_kept
from lightning_flatness.capture.hessian import LossCurvature, LossSums, Matrix, choose_parameters
from lightning_flatness.capture.isolation import differentiable, isolated, measuring_device, random_states_kept
from lightning_flatness.capture.live import KEEPS_TENSORS, Listener, same_inputs
from lightning_flatness.capture.observer import FlatnessObserver, LayerStatistics
from lightning_flatness.capture.operators import Operator, operators_of
from lightning_flatness.capture.options import MEASURES, Options, measuring_dtype
from lightning_flatness.capture.passes import ForwardPasses
from lightning_flatness.capture.points import Points
from lightning_flatness.capture.rows import num_rows
from lightning_flatness.capture.tensors import NamedDirection, NamedTensors, direction_between, pca_directions

__all__ = [
    "KEEPS_TENSORS",
    "MEASURES",
    "FlatnessObserver",
    "ForwardPasses",
    "LayerStatistics",
    "Listener",
    "LossCurvature",
    "LossSums",
    "Matrix",
    "NamedDirection",
    "NamedTensors",
    "Operator",
    "Options",
    "Points",
    "choose_parameters",
    "differentiable",
    "direction_between",
    "drawing",
    "generators_kept",
    "isolated",
    "measuring_device",
    "measuring_dtype",
    "num_rows",
    "operators_of",
    "pca_directions",
    "random_states_kept",
    "same_inputs",
]
