"""Measure several models on the same samples, reading the data once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.batches import paired_batches
from lightning_flatness.measure.forward_numbers import forward_numbers
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.progress import length_of, progress_bar
from lightning_flatness.model.call import map_tensors
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

    The batches are read once. ``data`` describes the batches in the reports. Messages of errors name the model.
    """
    options = {"per_sample": True, **options}
    measurements = {name: Measurement(model, **options) for name, model in models.items()}
    first = next(iter(models.values()))
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(kept_switched(model))
        with progress_bar(progress) as bar, paired_batches(first, batches) as pairs:
            number = length_of(batches)
            task = bar.add_task("Flatness", total=None if number is None else number * len(models))
            for inputs, targets in pairs:
                for name, measurement in measurements.items():
                    with model_named(name):
                        measurement.update(*_moved((inputs, targets), models[name]))
                    bar.advance(task)
        reports = {}
        for name, measurement in measurements.items():
            with model_named(name):
                reports[name] = replace(measurement.report(), data=data)
    return reports


def _moved(batch: Any, model: nn.Module) -> Any:
    """Return a batch with all tensors on the model's device."""
    tensor = next((tensor for tensor in [*model.parameters(), *model.buffers()]), None)
    return batch if tensor is None else map_tensors(batch, lambda part: part.to(tensor.device))


@contextmanager
def model_named(name: str) -> Iterator[None]:
    """Put the model's name in front of the message of every ``FlatnessError`` raised inside the block."""
    try:
        yield
    except FlatnessError as error:
        raise type(error)(f"Model '{name}': {error}") from error


@dataclass(frozen=True)
class Beside:
    """Adds the training loss and the baselines of models to the rows of a comparison.

    The training loss is measured only if ``train_batches`` are given. The baselines, margin and feature spread, are
    measured only if ``batches`` are given (see :class:`ForwardNumbers`).
    """

    batches: Iterable[Any] | None
    train_batches: Iterable[Any] | None
    options: Mapping[str, Any]

    def add(self, row: ComparedModel, model: nn.Module) -> ComparedModel:
        """Return ``row`` with the baselines of ``model``, and with its training loss unless ``row`` has one already."""
        with model_named(row.name):
            if self.train_batches is not None and math.isnan(row.train_loss):
                row = replace(row, train_loss=forward_numbers(model, self.train_batches, self._options).loss)
            if self.batches is not None:
                found = forward_numbers(model, self.batches, self._options)
                row = replace(row, margin=found.margin, feature_spread=found.feature_spread)
        return row

    @property
    def _options(self) -> MeasuringOptions:
        known = {field.name for field in fields(MeasuringOptions) if field.init}
        return MeasuringOptions(**{name: value for name, value in self.options.items() if name in known})
