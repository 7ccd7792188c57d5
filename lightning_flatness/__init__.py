"""Measure the exact flatness of neural networks while they train."""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_flatness.versions import __version__ as __version__

if TYPE_CHECKING:
    from lightning_flatness.callbacks.checkpoint import FlatCheckpoint
    from lightning_flatness.callbacks.flatness import FlatnessCallback
    from lightning_flatness.callbacks.landscape import LandscapeCallback
    from lightning_flatness.callbacks.penalty import FlatnessPenalty
    from lightning_flatness.callbacks.spectrum import SpectrumCallback
    from lightning_flatness.callbacks.stopping import FlatnessStopping
    from lightning_flatness.errors import BatchError, FlatnessError, LandscapeError, LayerSelectionError, NotExactError
    from lightning_flatness.layers.observer import FlatnessObserver
    from lightning_flatness.measure.compare import compare
    from lightning_flatness.measure.flatness import measure_flatness
    from lightning_flatness.measure.lambda_max import measure_lambda_max
    from lightning_flatness.measure.landscape import loss_landscape
    from lightning_flatness.measure.metric import FlatnessMetric
    from lightning_flatness.measure.spectrum import hessian_spectrum
    from lightning_flatness.model.directions import direction_between, pca_directions
    from lightning_flatness.pages import save_html
    from lightning_flatness.results import (
        Comparison,
        FlatnessReport,
        LambdaMaxReport,
        LandscapeResult,
        LayerFlatness,
        LayerLambdaMax,
        SpectrumResult,
        TrajectoryResult,
    )

__all__ = [
    "BatchError",
    "Comparison",
    "FlatCheckpoint",
    "FlatnessCallback",
    "FlatnessError",
    "FlatnessMetric",
    "FlatnessObserver",
    "FlatnessPenalty",
    "FlatnessReport",
    "FlatnessStopping",
    "LambdaMaxReport",
    "LandscapeCallback",
    "LandscapeError",
    "LandscapeResult",
    "LayerFlatness",
    "LayerLambdaMax",
    "LayerSelectionError",
    "NotExactError",
    "SpectrumCallback",
    "SpectrumResult",
    "TrajectoryResult",
    "compare",
    "direction_between",
    "hessian_spectrum",
    "loss_landscape",
    "measure_flatness",
    "measure_lambda_max",
    "pca_directions",
    "save_html",
]

# The modules that define the public names. A name is imported when a user first accesses it, because users of plain
# PyTorch need not have Lightning installed.
_MODULES = {
    "callbacks.checkpoint": ["FlatCheckpoint"],
    "callbacks.flatness": ["FlatnessCallback"],
    "callbacks.penalty": ["FlatnessPenalty"],
    "callbacks.stopping": ["FlatnessStopping"],
    "callbacks.landscape": ["LandscapeCallback"],
    "callbacks.spectrum": ["SpectrumCallback"],
    "errors": ["BatchError", "FlatnessError", "LandscapeError", "LayerSelectionError", "NotExactError"],
    "layers.observer": ["FlatnessObserver"],
    "measure.compare": ["compare"],
    "measure.flatness": ["measure_flatness"],
    "measure.lambda_max": ["measure_lambda_max"],
    "measure.landscape": ["loss_landscape"],
    "measure.metric": ["FlatnessMetric"],
    "measure.spectrum": ["hessian_spectrum"],
    "model.directions": ["direction_between", "pca_directions"],
    "pages": ["save_html"],
    "results": [
        "Comparison",
        "FlatnessReport",
        "LambdaMaxReport",
        "LandscapeResult",
        "LayerFlatness",
        "LayerLambdaMax",
        "SpectrumResult",
        "TrajectoryResult",
    ],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_PUBLIC_MODULES = ("functional", "pages", "plots", "results", "testing")


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _PUBLIC_MODULES:
        raise AttributeError(f"module 'lightning_flatness' has no attribute '{name}'")
    state = random.getstate()  # importing rich draws random numbers
    try:
        module = import_module(f"lightning_flatness.{_HOMES.get(name, name)}")
    finally:
        random.setstate(state)
    if name in _PUBLIC_MODULES:
        return module
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PUBLIC_MODULES})
