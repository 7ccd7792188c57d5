"""Results of measurements, as frozen dataclasses that can be printed, converted to plain data, and saved."""

from lightning_flatness.results.cautions import CAUTIONS, Caution
from lightning_flatness.results.comparison import ComparedModel, Comparison, Difference
from lightning_flatness.results.flatness import FlatnessReport, LayerFlatness
from lightning_flatness.results.lambda_max import LambdaMaxReport, LayerLambdaMax
from lightning_flatness.results.landscape import SETTINGS, LandscapeResult
from lightning_flatness.results.rank_correlation import BASELINES, MEASURES, RankCorrelation
from lightning_flatness.results.spectrum import CRITERIA, SpectrumResult
from lightning_flatness.results.tables import SAMPLED, LayerInfo, merged, summary_table
from lightning_flatness.results.texts import as_text, number_of
from lightning_flatness.results.trajectory import TrajectoryResult

__all__ = [
    "BASELINES", "CAUTIONS", "CRITERIA", "MEASURES", "SAMPLED", "SETTINGS", "Caution", "ComparedModel", "Comparison",
    "Difference", "FlatnessReport", "LambdaMaxReport", "LandscapeResult", "LayerFlatness", "LayerInfo",
    "LayerLambdaMax", "RankCorrelation", "SpectrumResult", "TrajectoryResult", "as_text", "merged", "number_of",
    "summary_table",
]  # fmt: skip
