"""Frozen records of measurements, with their tables and files."""

from lightning_flatness.results.flatness import FlatnessReport, LayerFlatness, LayerLambdaMax
from lightning_flatness.results.landscape import SETTINGS, LandscapeResult
from lightning_flatness.results.spectrum import CRITERIA, SpectrumResult
from lightning_flatness.results.tables import SAMPLED, LayerInfo, as_text, merged, number_of, summary_table

__all__ = [
    "CRITERIA", "SAMPLED", "SETTINGS", "FlatnessReport", "LandscapeResult", "LayerFlatness", "LayerInfo",
    "LayerLambdaMax", "SpectrumResult", "as_text", "merged", "number_of", "summary_table",
]  # fmt: skip
