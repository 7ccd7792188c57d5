"""Exact flatness of neural networks while they train."""

from lightning_flatness.callbacks import FlatnessCallback, FlatnessStopping
from lightning_flatness.capture import FlatnessObserver
from lightning_flatness.errors import BatchError, FlatnessError, LayerSelectionError, NotExactError
from lightning_flatness.metrics import FlatnessMetric, hessian_spectrum, measure_flatness, measure_lambda_max
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerLambdaMax, SpectrumResult

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "FlatnessCallback",
    "FlatnessError",
    "FlatnessMetric",
    "FlatnessObserver",
    "FlatnessReport",
    "FlatnessStopping",
    "LayerFlatness",
    "LayerLambdaMax",
    "LayerSelectionError",
    "NotExactError",
    "SpectrumResult",
    "hessian_spectrum",
    "measure_flatness",
    "measure_lambda_max",
]
