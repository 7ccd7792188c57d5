"""Compare models by their flatness: which is flatter, by how much, how sure, and what must not be concluded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.cautions import cautions_of
from lightning_flatness.measure.compared import covariances_of, errors_of, have_same_samples, row_of
from lightning_flatness.measure.flatness import measure_flatness
from lightning_flatness.results import Comparison, FlatnessReport

Models = Mapping[str, FlatnessReport | nn.Module] | Sequence[FlatnessReport | nn.Module]


def compare(models: Models, batches: Iterable[Any] | None = None, **options: Any) -> Comparison:
    """Compare models, or their reports, by the flatness of a layer.

    Args:
        models: reports of :func:`~lightning_flatness.measure_flatness`, or models, by name or as a sequence. The first
            is the reference.
        batches: data to measure models on, each on the same samples.
        **options: options of :func:`~lightning_flatness.measure_flatness` for models.

    Returns:
        A :class:`~lightning_flatness.Comparison`.

    Raises:
        FlatnessError: there are fewer than two models, a model has no batches, or an option has no model.
    """
    named = _named(models)
    reports = {
        name: _measured(model, batches, {"per_sample": True} | options) if isinstance(model, nn.Module) else model
        for name, model in named.items()
    }
    is_paired = have_same_samples(list(reports.values()))
    covariances = covariances_of(list(reports.values()), is_paired)
    rows = {
        name: replace(row_of(name, report), errors=errors_of(covariances, index))
        for index, (name, report) in enumerate(reports.items())
    }
    return Comparison(rows, cautions_of(rows), covariances, is_paired)


def _measured(model: nn.Module, batches: Iterable[Any] | None, options: dict[str, Any]) -> FlatnessReport:
    if batches is None:
        raise FlatnessError("Models are compared on data: give batches=, or reports of measure_flatness.")
    return measure_flatness(model, batches, **options)


def _named(models: Models) -> dict[str, FlatnessReport | nn.Module]:
    """Return models by name; those of a sequence are called 1, 2, ..."""
    named = dict(models) if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models, start=1)}
    if len(named) < 2:
        raise FlatnessError(f"{len(named)} model was given; a comparison takes two or more.")
    for name, model in named.items():
        if not isinstance(model, (FlatnessReport, nn.Module)):
            raise FlatnessError(f"'{name}' is a {type(model).__name__}; give FlatnessReports or models.")
    return named
