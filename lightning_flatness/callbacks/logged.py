"""What is logged of a report, and what is not while measuring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_flatness.callbacks.lightning_imports import LightningModule, is_lightning_module
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.results import FlatnessReport


def values_of(report: FlatnessReport, measures: Sequence[str]) -> dict[str, float]:
    """Measures of the whole and, if there are several layers, of each, by key without prefix."""
    values = {measure: getattr(report, measure) for measure in measures}
    values["weight_norm"] = report.weight_norm
    if len(report.layers) > 1:
        values |= {
            f"{name}/{measure}": getattr(layer, measure)
            for name, layer in report.layers.items()
            for measure in measures
        }
    return values


def with_logarithm(values: Mapping[str, float], measure: str) -> dict[str, float]:
    """The values and the logarithm of one of them, which fits into a chart beside an accuracy.

    Example:
        >>> with_logarithm({"hessian_trace": 100.0}, "hessian_trace")
        {'hessian_trace': 100.0, 'log10_hessian_trace': 2.0}
    """
    value = values[measure]
    return {**values, f"log10_{measure}": math.log10(value) if value > 0 else math.nan}


def log(pl_module: LightningModule, prefix: str, values: Mapping[str, float]) -> None:
    """Log values that all ranks have alike."""
    device = pl_module.device
    kind = torch.float64 if measuring_device(device) == device else torch.float32
    for key, value in values.items():
        pl_module.log(
            f"{prefix}/{key}",
            torch.tensor(value, dtype=kind),
            on_step=False,
            on_epoch=True,
            sync_dist=True,  # they are alike, but Lightning warns of what it is not told to synchronise
            batch_size=1,
        )


@contextmanager
def logging_muted(pl_module: LightningModule) -> Iterator[None]:
    """A forward that logs would otherwise log what it is measured on, or may not log at all at this time.

    Example:
        >>> module = LightningModule()
        >>> with logging_muted(module):
        ...     module.log("key", 1.0)
    """
    modules = [vars(module) for module in pl_module.modules() if is_lightning_module(module)]
    own = [{name: attributes[name] for name in LOGGING if name in attributes} for attributes in modules]
    for attributes in modules:
        attributes.update(dict.fromkeys(LOGGING, _nothing))
    try:
        yield
    finally:
        for attributes, before in zip(modules, own, strict=True):
            for name in LOGGING:
                del attributes[name]
            attributes.update(before)


LOGGING = ("log", "log_dict")


def _nothing(*arguments: Any, **options: Any) -> None:
    pass
