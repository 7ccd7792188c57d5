"""Exact flatness of neural networks while they train."""

from lightning_flatness.callbacks import FlatnessCallback, FlatnessStopping, LandscapeCallback, SpectrumCallback
from lightning_flatness.capture import FlatnessObserver, direction_between, pca_directions
from lightning_flatness.errors import BatchError, FlatnessError, LandscapeError, LayerSelectionError, NotExactError
from lightning_flatness.metrics import (
    FlatnessMetric,
    hessian_spectrum,
    loss_landscape,
    measure_flatness,
    measure_lambda_max,
)
from lightning_flatness.results import (
    FlatnessReport,
    LandscapeResult,
    LayerFlatness,
    LayerLambdaMax,
    SpectrumResult,
)

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "FlatnessCallback",
    "FlatnessError",
    "FlatnessMetric",
    "FlatnessObserver",
    "FlatnessReport",
    "FlatnessStopping",
    "LandscapeCallback",
    "LandscapeError",
    "LandscapeResult",
    "LayerFlatness",
    "LayerLambdaMax",
    "LayerSelectionError",
    "NotExactError",
    "SpectrumCallback",
    "SpectrumResult",
    "direction_between",
    "hessian_spectrum",
    "loss_landscape",
    "measure_flatness",
    "measure_lambda_max",
    "pca_directions",
]
