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

__all__ = [
    "SAMPLED",
    "SETTINGS",
    "FlatnessReport",
    "LandscapeResult",
    "LayerFlatness",
    "LayerInfo",
    "LayerLambdaMax",
    "as_text",
    "merged",
    "summary_table",
]
