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

__all__ = [
    "SAMPLED",
    "FlatnessReport",
    "LayerFlatness",
    "LayerInfo",
    "LayerLambdaMax",
    "as_text",
    "merged",
    "summary_table",
]
