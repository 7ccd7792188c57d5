"""Measure several models on the same samples, reading the data once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from torch import nn

from lightning_flatness.errors import naming
from lightning_flatness.measure.batches import as_batches, moved, paired_batches
from lightning_flatness.measure.forward_numbers import forward_numbers
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.progress import length_of, progress_bar
from lightning_flatness.model.isolation import kept_switched
from lightning_flatness.model.options import MeasuringOptions
from lightning_flatness.results import ComparedModel, FlatnessReport


def measured_together(
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    data: str,
    progress: bool | None,
    options: Mapping[str, Any],
) -> dict[str, FlatnessReport]:
    """Measure models on the same batches, and return a mapping from names of models to reports with per-sample values.

    The batches are read once. ``data`` is their name in the reports, such as ``"train"``. Messages of errors name the
    model.
    """
    options = {"per_sample": True, **options}
    measurements = {name: Measurement(model, **options) for name, model in models.items()}
    first = next(iter(models.values()))
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(kept_switched(model))
        with progress_bar(progress) as bar, paired_batches(first, batches) as pairs:
            number = length_of(as_batches(batches))
            task = bar.add_task("Flatness", total=None if number is None else number * len(models))
            for inputs, targets in pairs:
                for name, measurement in measurements.items():
                    with naming(name, "Model"):
                        measurement.update(*moved((inputs, targets), models[name]))
                    bar.advance(task)
        reports = {}
        for name, measurement in measurements.items():
            with naming(name, "Model"):
                reports[name] = replace(measurement.report(), data=data)
    return reports


def with_forward_numbers(
    row: ComparedModel,
    model: nn.Module,
    batches: Iterable[Any] | None,
    train_batches: Iterable[Any] | None,
    options: Mapping[str, Any],
) -> ComparedModel:
    """Return a row of a comparison, completed with the training loss and the baselines of its model.

    The training loss is measured on ``train_batches``, unless these are None or the row has one already. The baselines
    are the margin and the feature spread (see :class:`ForwardNumbers`). They are measured on ``batches``, unless these
    are None. ``options`` are those of ``measure_flatness``. Messages of errors name the model.
    """
    known = {field.name for field in fields(MeasuringOptions) if field.init}
    measuring = MeasuringOptions(**{name: value for name, value in options.items() if name in known})
    with naming(row.name, "Model"):
        if train_batches is not None and math.isnan(row.train_loss):
            row = replace(row, train_loss=forward_numbers(model, train_batches, measuring).loss)
        if batches is not None:
            found = forward_numbers(model, batches, measuring)
            row = replace(row, margin=found.margin, feature_spread=found.feature_spread)
    return row
