"""Compute rank correlations between each number of a comparison and an outcome, over the models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional.rank_correlation import bootstrap_interval, granulated_tau, kendall_tau, partial_tau
from lightning_flatness.results import BASELINES, MEASURES, ComparedModel, RankCorrelation

# Numbers that partial correlations hold constant.
HELD = ("train_loss", "weight_norm")


def correlations_of(
    rows: Mapping[str, ComparedModel], hyperparameters: Mapping[str, Mapping[str, Any]]
) -> tuple[RankCorrelation, ...]:
    """Return the rank correlations of all measures, and then of all baselines, with the outcome.

    A number is left out unless at least two models have both this number and an outcome. Raise a
    :class:`FlatnessError` if a model lacks a hyper-parameter that another model has.
    """
    keys = {key for settings in hyperparameters.values() for key in settings}
    for name, settings in hyperparameters.items():
        missing = sorted(keys - settings.keys())
        if missing:
            raise FlatnessError(
                f"hyperparameters= of model '{name}' has no '{missing[0]}', which other models have. Give it for all."
            )
    settings = {name: tuple(of_model[key] for key in sorted(keys)) for name, of_model in hyperparameters.items()}
    found = (_correlation(number, rows, settings) for number in (*MEASURES, *BASELINES))
    return tuple(one for one in found if one.num_models > 1)


def _correlation(
    number: str, rows: Mapping[str, ComparedModel], settings: Mapping[str, tuple[Any, ...]]
) -> RankCorrelation:
    """Return the rank correlation of one number with the outcome, over the models that have both."""
    known = [n for n, row in rows.items() if math.isfinite(getattr(row, number)) and math.isfinite(row.outcome)]
    values, outcome = _column(rows, known, number), _column(rows, known, "outcome")
    low, high = bootstrap_interval(values, outcome)
    held = {key: _column(rows, known, key) for key in HELD}
    return RankCorrelation(
        measure=number,
        tau=kendall_tau(values, outcome),
        low=low,
        high=high,
        given={
            key: partial_tau(values, outcome, column) if bool(column.isfinite().all()) else math.nan
            for key, column in held.items()
        },
        granulated=granulated_tau(values, outcome, [settings[name] for name in known]) if settings else math.nan,
        is_baseline=number in BASELINES,
        num_models=len(known),
    )


def _column(rows: Mapping[str, ComparedModel], names: list[str], number: str) -> Tensor:
    """Return one number of each model in ``names``, as a float64 vector."""
    return torch.tensor([getattr(rows[name], number) for name in names], dtype=torch.float64, device="cpu")
