"""Level 2: sums over batches and ranks."""

from lightning_flatness.metrics.flatness_metric import FlatnessMetric
from lightning_flatness.metrics.measurement import Measurement, measure_flatness, split_batch

__all__ = ["FlatnessMetric", "Measurement", "measure_flatness", "split_batch"]
