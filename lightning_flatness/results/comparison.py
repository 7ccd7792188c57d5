"""The comparison of several models, as frozen records: a row for every model, differences, and what they tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.cautions import ABOUT_NUMBERS, Caution
from lightning_flatness.results.comparison_tables import as_page, decision_table, measures_table
from lightning_flatness.results.rank_correlation import BASELINES, BEST, MEASURES, RankCorrelation, correlation_table
from lightning_flatness.results.records import Record, flat
from lightning_flatness.results.texts import as_text, measured, named

# A difference counts as clear if it is larger than so many standard errors of the difference.
CLEAR = 2.0


@dataclass(frozen=True, repr=False)
class Difference(Record):
    """Difference of one number of two models, the other's minus the reference's, and their ratio, with standard errors.

    Attributes:
        value: the difference.
        error: its standard error over samples, and of estimates; NaN if it is not known.
        ratio: the number divided by the reference's; NaN unless the reference's is positive.
        ratio_error: standard error of the ratio, to first order; NaN if it is not known.
        is_paired: whether the error takes into account that both were measured on the same samples.
    """

    value: float
    error: float
    ratio: float
    ratio_error: float
    is_paired: bool

    @property
    def is_known(self) -> bool:
        """Whether the difference has an error, so that it can be judged."""
        return math.isfinite(self.value) and math.isfinite(self.error)

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than two standard errors; not where the error is not known."""
        return self.is_known and abs(self.value) > CLEAR * self.error

    def _line(self) -> str:
        clear = "clear" if self.is_clear else "not clear" if self.is_known else "of unknown error"
        return f"{measured(self.value, self.error)}, {measured(self.ratio, self.ratio_error)} times, {clear}"

    def table(self) -> Table:
        """Return a rich table of the difference and the ratio."""
        table = Table("difference", "ratio", "larger than two standard errors")
        clear = "yes" if self.is_clear else "no" if self.is_known else "not known"
        table.add_row(measured(self.value, self.error), measured(self.ratio, self.ratio_error), clear)
        return table


@dataclass(frozen=True, repr=False)
class ComparedModel(Record):
    """One row of a comparison: the numbers of one model, and how they were measured. NaN stands for what is not known.

    Attributes:
        loss: mean loss over the measured samples.
        train_loss: mean loss over training data.
        margin: mean of the target's logit minus the largest other one.
        feature_spread: mean squared norm of the classifier's input times the spread of its weights over classes.
        outcome: what the measures are to tell, as given: a generalization gap, a test loss.
        errors: standard errors by number, over samples and of estimates.
        layers: names of the measured layers.
        filters, features: number of filters of each measured layer, and of the weights of one filter.
        depth: number of convolutions and linear layers of the whole network; 0 if nobody counted them.
        batch_norms: number of its BatchNorm layers.
        fresh_batch_norms: number of those that were never updated.
        reasons: why the numbers are not exact; empty if they are.
    """

    name: str
    loss: float
    accuracy: float
    normalized_relative_flatness: float
    relative_flatness: float
    relative_flatness_per_loss: float
    relative_flatness_per_curvature: float
    hessian_trace: float
    weight_norm: float
    errors: Mapping[str, float]
    exact: bool
    method: str
    reasons: tuple[str, ...]
    precision: str
    loss_name: str
    data: str
    num_samples: int
    layers: tuple[str, ...]
    filters: tuple[int, ...]
    features: tuple[int, ...]
    depth: int = 0
    batch_norms: int = 0
    fresh_batch_norms: int = 0
    train_loss: float = math.nan
    margin: float = math.nan
    feature_spread: float = math.nan
    outcome: float = math.nan

    def shown(self, measure: str) -> str:
        """Return a number with its standard error, as tables show it."""
        return measured(getattr(self, measure), self.errors.get(measure, math.nan))

    def _line(self) -> str:
        exact = "exact" if self.exact else "not exact"
        return f"{self.name}: normalised {self.shown(BEST)}, loss {self.shown('loss')}, {exact}"

    def table(self) -> Table:
        """Return a rich table of the model's numbers."""
        table = Table("number", "value", title=self.name)
        for name, heading in (MEASURES | BASELINES | {"accuracy": "accuracy"}).items():
            table.add_row(heading, self.shown(name))
        return table


@dataclass(frozen=True, repr=False)
class Comparison(Record):
    """Several models side by side, by the flatness of one or several layers; ``print(comparison)`` shows a table.

    Lower is flatter. ``cautions`` say what must not be concluded; read them first. The differences are those to the
    first model, the reference.

    Attributes:
        models: a row for every model, by name, in the order given.
        cautions: reasons why models cannot be compared as they are.
        covariances: of the errors of every model's number, float64 ``(M, M)``, by number. What is not on the diagonal
            is zero unless the models were measured on the same samples and this is known (``is_paired``).
        is_paired: whether errors of differences are those of the same samples, measured in both models.
        correlations: how each number agrees with the outcome; empty without outcomes.
        outcome_name: what the outcome is.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> batch = torch.randn(64, 4), torch.arange(64) % 3
        >>> nets = {name: torch.nn.Sequential(torch.nn.Linear(4, 3)) for name in "ab"}
        >>> reports = {name: lf.measure_flatness(net, [batch], layers="0") for name, net in nets.items()}
        >>> comparison = lf.compare(reports)
        >>> list(comparison.models), comparison.reference, comparison.is_paired
        (['a', 'b'], 'a', False)
    """

    models: Mapping[str, ComparedModel]
    cautions: tuple[Caution, ...]
    covariances: Mapping[str, Tensor] = field(default_factory=dict)
    is_paired: bool = False
    correlations: tuple[RankCorrelation, ...] = ()
    outcome_name: str = ""

    @property
    def reference(self) -> str:
        """Name of the first model, which the others are compared with."""
        return next(iter(self.models))

    @property
    def exact(self) -> bool:
        """Whether the numbers of all models are those of the Hessian."""
        return all(model.exact for model in self.models.values())

    @property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """Differences to the first model, by model and number."""
        numbers = ("loss", "accuracy", *MEASURES)
        return {
            name: {number: self.difference(number, name) for number in numbers}
            for name in self.models
            if name != self.reference
        }

    @property
    def verdict(self) -> str:
        """Which model is the flattest by the normalised measure, by how much, how sure that is, and what is against."""
        return self._found + self._doubt

    @property
    def _doubt(self) -> str:
        kinds = [caution for caution in self.cautions if caution.kind not in ABOUT_NUMBERS]
        if not kinds:
            return ""
        return f" But the models cannot be compared as they are: {', '.join(dict.fromkeys(c.short for c in kinds))}."

    @property
    def _found(self) -> str:
        values = {name: model.normalized_relative_flatness for name, model in self.models.items()}
        order = sorted((name for name, value in values.items() if math.isfinite(value)), key=values.__getitem__)
        if len(order) < 2:
            return "The normalised measure is not known of two models, so no model can be called the flattest."
        lowest, second = order[:2]
        others = {name: self.difference(BEST, name, lowest) for name in order[1:]}
        unsure = [name for name, found in others.items() if not found.is_clear]
        if all(not others[name].is_known for name in unsure) and unsure:
            return (
                f"{lowest} has the lowest normalised flatness. How sure that is, is not known, as errors are missing."
            )
        if unsure:
            return (
                f"A tie: {lowest} has the lowest normalised flatness, and {named(unsure)} no more than two standard "
                "errors above it."
            )
        found = others[second]
        factor = f" ({measured(found.ratio, found.ratio_error)} times)" if found.ratio > 0 else ""
        return (
            f"{lowest} is {'the flattest' if len(order) > 2 else 'flatter'} by the normalised measure. That of "
            f"{second} is larger by {measured(found.value, found.error)}{factor}: a clear difference, of "
            f"{_standard_errors(found)}."
        )

    def difference(self, number: str, name: str, reference: str | None = None) -> Difference:
        """Return by how much a number of model ``name`` differs from that of the ``reference``, by default the first.

        ``number`` is ``"loss"``, ``"accuracy"`` or one of the measures. Raises a :class:`FlatnessError` for others.
        """
        names = list(self.models)
        reference = self.reference if reference is None else reference
        for one in (name, reference):
            if one not in self.models:
                raise FlatnessError(f"There is no model '{one}'; there are {named(names)}.")
        if number not in ("loss", "accuracy", *MEASURES):
            raise FlatnessError(f"number={number!r}: give 'loss', 'accuracy' or one of {', '.join(MEASURES)}.")
        value, of_reference = (float(getattr(self.models[one], number)) for one in (name, reference))
        first, second = names.index(reference), names.index(name)
        covariance = self.covariances.get(number)
        of_errors = (
            [[math.nan] * 2] * 2 if covariance is None else covariance[[first, second]][:, [first, second]].tolist()
        )
        (own, both), (_, other) = of_errors
        ratio = value / of_reference if of_reference > 0 else math.nan
        variance = other + own - 2 * both
        of_ratio = (other + ratio**2 * own - 2 * ratio * both) / of_reference**2 if of_reference > 0 else math.nan
        return Difference(value - of_reference, _root(variance), ratio, _root(of_ratio), self.is_paired)

    def table(self) -> Table:
        """Return a rich table with a row for every model, and below it the verdict and the cautions."""
        return decision_table(self)

    def tables(self) -> list[Table]:
        """Return all tables: that of :meth:`table`, the other measures, and the rank correlations if there are any."""
        correlations = [correlation_table(self.correlations, self.outcome_name)] if self.correlations else []
        return [self.table(), measures_table(self), *correlations]

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __str__(self) -> str:
        return "\n".join(map(as_text, self.tables()))

    def _repr_html_(self) -> str:
        return as_page(self)

    def _line(self) -> str:
        cautions = f", cautions: {', '.join(caution.kind for caution in self.cautions)}" if self.cautions else ""
        return f"{', '.join(self.models)}: {self.verdict}{cautions}"

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, model in self.models.items():
            values = flat(model._values(tensors=False))
            row = {"model": name} | {key: value for key, value in values.items() if key != "name"}
            for number in ("loss", "accuracy", *MEASURES):
                found = self.difference(number, name)
                row |= {f"{number}_ratio": found.ratio, f"{number}_ratio_error": found.ratio_error}
                row |= {f"{number}_is_clear": found.is_clear}
            rows.append(row)
        return rows


def _standard_errors(found: Difference) -> str:
    return f"{abs(found.value) / found.error:.2g} standard errors" if found.error else "more than two standard errors"


def _root(variance: float) -> float:
    """Return the root of a variance; zero where it is negative by rounding."""
    return math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
