"""Level 2: sums over batches and ranks."""

from lightning_flatness.metrics.axes import KINDS
from lightning_flatness.metrics.batches import split_batch
from lightning_flatness.metrics.flatness_metric import FlatnessMetric
from lightning_flatness.metrics.lambda_max import measure_lambda_max
from lightning_flatness.metrics.landscape import check_landscape_options, loss_landscape
from lightning_flatness.metrics.measurement import Measurement, measure_flatness
from lightning_flatness.metrics.ranks import gather
from lightning_flatness.metrics.spectrum import check_spectrum_options, hessian_spectrum

__all__ = [
    "KINDS",
    "FlatnessMetric",
    "Measurement",
    "check_landscape_options",
    "check_spectrum_options",
    "gather",
    "hessian_spectrum",
    "loss_landscape",
    "measure_flatness",
    "measure_lambda_max",
    "split_batch",
]
