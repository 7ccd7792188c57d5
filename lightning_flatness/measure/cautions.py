"""Find reasons against comparing models, from the rows of their comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

from lightning_flatness.functional.rank_correlation import FEWEST
from lightning_flatness.functional.sampling import GROUPS
from lightning_flatness.measure.batch_norm import statistics_apart
from lightning_flatness.measure.network_cautions import network_cautions
from lightning_flatness.results import CAUTIONS, Caution, ComparedModel, number_of
from lightning_flatness.results.cautions import FEW_SAMPLES
from lightning_flatness.results.texts import named

# There is a caution if the largest and the smallest training loss differ by more than this share of the largest one.
MOST_APART = 0.1


def cautions_of(
    rows: Mapping[str, ComparedModel], networks: Mapping[str, nn.Module], batches: Iterable[Any] | None
) -> tuple[Caution, ...]:
    """Return the cautions of a comparison, in the order of ``CAUTIONS``.

    ``networks`` holds only the models that were given as modules, and not as reports. Networks with BatchNorm run once
    on the first batch, to find out whether their running statistics fit the data. They do not run if ``batches`` is
    None or an iterator.
    """
    found = [*_of_train_losses(rows), *_of_layers(rows), *_of_labels(rows), *_of_outcomes(rows)]
    found += [*_of_classes(rows), *network_cautions(rows, networks, statistics_apart(networks, batches))]
    return tuple(sorted(found, key=lambda caution: list(CAUTIONS).index(caution.kind)))


def _of_train_losses(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return a caution if a training loss is not known, or if training losses differ."""
    losses = {name: row.train_loss for name, row in rows.items()}
    unknown = tuple(name for name, loss in losses.items() if not math.isfinite(loss))
    if unknown:
        sentence = (
            f"The training loss is not known{_for(unknown, rows)}. Flatness measures rise early in training, and later "
            "fall with the training loss. So a model may look flatter only because it was trained longer, or hardly at "
            "all. Compare models of equal training loss."
        )
        return [Caution("train_loss_unknown", sentence, unknown)]
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    if losses[high] - losses[low] <= MOST_APART * abs(losses[high]):
        return []
    times = f", {losses[high] / losses[low]:.2g} times as much" if losses[low] > 0 else ""
    sentence = (
        f"Training losses differ: {low} has {losses[low]:.3g}, and {high} {losses[high]:.3g}{times}. That alone may "
        "decide which model looks flatter, since flatness measures rise early in training, and later fall with the "
        "training loss. Compare models of equal training loss, such as earlier epochs of the one that is further "
        "trained."
    )
    return [Caution("train_loss", sentence, tuple(rows))]


def _of_layers(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return cautions if the measured layers differ in name or in size."""
    found = []
    if _differ(row.layers for row in rows.values()):
        names = " / ".join(dict.fromkeys(named(row.layers) for row in rows.values()))
        sentence = f"Layers of different names are compared ({names}). The networks may differ in depth or kind."
        found.append(Caution("layers", sentence, tuple(rows)))
    if _differ((row.filters, row.features) for row in rows.values()):
        sentence = (
            f"Layers have different numbers of filters or features ({_sizes(rows)}). What flatness says across widths "
            "is not known."
        )
        found.append(Caution("width", sentence, tuple(rows)))
    return found


def _sizes(rows: Mapping[str, ComparedModel]) -> str:
    """Return a text about the first layer whose size differs: its size in each model, as filters x features."""
    pairs = {name: list(zip(row.filters, row.features, strict=True)) for name, row in rows.items()}
    places = zip_longest(*pairs.values())
    index = next(index for index, of_models in enumerate(places) if _differ(of_models))
    sizes = {name: "none" if index >= len(of) else "{} x {}".format(*of[index]) for name, of in pairs.items()}
    return named(f"{name}: {size}" for name, size in sizes.items())


def _of_labels(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return cautions if numbers are not exact, not known, of too few samples, or measured in different ways.

    The number that may be unknown is normalised relative flatness. Models were measured in different ways if loss,
    precision, data or number of samples differ, or, with numbers that are not exact, if the methods differ.
    """
    found = []
    inexact = tuple(name for name, row in rows.items() if not row.exact)
    if inexact:
        reasons = "; ".join(dict.fromkeys(reason for name in inexact for reason in rows[name].reasons))
        sentence = f"Numbers are not those of the Hessian{_for(inexact, rows)}: {reasons}."
        found.append(Caution("not_exact", sentence, inexact))
    shared = {
        "loss_function": ("loss_name", "Losses are different functions, or have other options"),
        "precision": ("precision", "Models were measured in different precisions"),
        "data": ("data", "Models were measured on different data"),
        "num_samples": ("num_samples", "Models were measured on different numbers of samples"),
    }
    if inexact:  # exact numbers do not depend on the method
        shared["method"] = ("method", "Numbers are from different methods")
    for kind, (field, words) in shared.items():
        values = {name: getattr(row, field) for name, row in rows.items()}
        if _differ(values.values()):
            listed = named(f"{name}: {value or 'not known'}" for name, value in values.items())
            found.append(Caution(kind, f"{words} ({listed}).", tuple(rows)))
    missing = tuple(name for name, row in rows.items() if math.isnan(row.normalized_relative_flatness))
    if missing:
        sentence = (
            f"The normalised measure is not known{_for(missing, rows)}. The other measures change when the channels "
            "that the layer reads are rescaled, although this leaves the network as it is."
        )
        found.append(Caution("not_normalised", sentence, missing))
    fewest = min(row.num_samples for row in rows.values())
    if fewest < GROUPS:
        sentence = f"{number_of(fewest, 'sample')}: too few for reliable standard errors; use {GROUPS} or more."
        found.append(Caution(FEW_SAMPLES, sentence, tuple(rows)))
    return found


def _of_classes(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return a caution if networks have different numbers of classes. Unknown numbers are ignored."""
    numbers = {name: row.num_classes for name, row in rows.items() if row.num_classes}
    if not _differ(numbers.values()):
        return []
    listed = named(f"{name}: {number}" for name, number in numbers.items())
    sentence = (
        f"Networks have different numbers of classes ({listed}). The loss, and flatness with it, depends on that "
        "number: compare networks that tell the same classes apart."
    )
    return [Caution("classes", sentence, tuple(rows))]


def _of_outcomes(rows: Mapping[str, ComparedModel]) -> list[Caution]:
    """Return a caution if at least one but fewer than ``FEWEST`` models have an outcome, such as a test loss."""
    number = sum(math.isfinite(row.outcome) for row in rows.values())
    if not 0 < number < FEWEST:
        return []
    sentence = (
        f"{number_of(number, 'model')} with an outcome: too few to conclude anything about how flatness is related to "
        "the outcome. Some dozens of models are needed."
    )
    return [Caution("few_models", sentence, tuple(rows))]


def _differ(values: object) -> bool:
    """Return whether the values are not all equal."""
    return len(set(values)) > 1  # type: ignore[call-overload]


def _for(names: tuple[str, ...], rows: Mapping[str, ComparedModel]) -> str:
    """Return the text " for" and ``names``, or an empty text if these are the names of all models."""
    return "" if len(names) == len(rows) else f" for {named(names)}"
