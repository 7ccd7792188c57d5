"""Frozen records of what was measured, and their tables."""

from lightning_flatness.results.flatness import (
    SAMPLED,
    FlatnessReport,
    LayerFlatness,
    LayerInfo,
    LayerLambdaMax,
    as_text,
    merged,
    summary_table,
)
from lightning_flatness.results.landscape import SETTINGS, LandscapeResult
from lightning_flatness.results.spectrum import CRITERIA, SpectrumResult, number_of

__all__ = [
    "CRITERIA",
    "SAMPLED",
    "SETTINGS",
    "FlatnessReport",
    "LandscapeResult",
    "LayerFlatness",
    "LayerInfo",
    "LayerLambdaMax",
    "SpectrumResult",
    "as_text",
    "merged",
    "number_of",
    "summary_table",
]
