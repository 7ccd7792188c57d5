"""The comparison of several models, as frozen records: a row for every model, differences, and what they tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.cautions import Caution
from lightning_flatness.results.rank_correlation import BASELINES, MEASURES, RankCorrelation, correlation_table
from lightning_flatness.results.records import Record, flat
from lightning_flatness.results.texts import as_text, measured, named, number_of

# The measure that compares networks (docs/theory.md, "Invariance").
BEST = "normalized_relative_flatness"
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
        num_layers: number of convolutions and linear layers of the network; 0 if only its report is known.
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
    num_layers: int = 0
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
        """Which model is the flattest by the normalised measure, by how much, and how sure that is, in a sentence."""
        known = {name: model.normalized_relative_flatness for name, model in self.models.items()}
        known = {name: value for name, value in known.items() if math.isfinite(value)}
        if len(known) < 2:
            return "The normalised measure is not known for two models, so none can be called the flattest."
        order = sorted(known, key=known.__getitem__)
        lowest = order[0]
        differences = {name: self.difference(BEST, name, lowest) for name in order[1:]}
        unknown = [name for name, found in differences.items() if not found.is_known]
        level = [name for name, found in differences.items() if found.is_known and not found.is_clear]
        second = differences[order[1]]
        factor = f", {measured(second.ratio, second.ratio_error)} times" if second.ratio > 0 else ""
        if level:
            others = f"{named(level)} {'differs' if len(level) == 1 else 'differ'}"
            return f"{lowest} has the lowest number, but {others} from it by less than two standard errors: a tie."
        if unknown:
            return f"{lowest} has the lowest number; how sure that is, is not known, since errors are missing."
        return (
            f"{lowest} is the flattest; the next, {order[1]}, has {measured(second.value, second.error)} more{factor}, "
            "which is more than two standard errors."
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
        """Return a rich table with a row for every model, and the cautions below."""
        rows = self.models.values()
        baselines = [key for key in BASELINES if key == "loss" or any(_is_known(row, key) for row in rows)]
        measures = [key for key in MEASURES if any(_is_known(row, key) for row in rows)]
        table = Table(title=self._title(), caption="\n".join(self._sentences()), caption_justify="left")
        table.add_column("model", overflow="fold")
        for key in measures:
            table.add_column(MEASURES[key], justify="right")
            if key == BEST:
                table.add_column(f"/ {self.reference}", justify="right")
        for heading in ("accuracy", *(BASELINES[key] for key in baselines)):
            table.add_column(heading, justify="right")
        if self.outcome_name:
            table.add_column(self.outcome_name, justify="right")
        table.add_column("exact")
        for name, row in self.models.items():
            cells = []
            for key in measures:
                cells.append(self._shown(key, name))
                if key == BEST:
                    found = self.difference(BEST, name)
                    cells.append("1" if name == self.reference else measured(found.ratio, found.ratio_error))
            cells += [row.shown(key) for key in ("accuracy", *baselines)]
            cells += [measured(row.outcome)] if self.outcome_name else []
            table.add_row(Text(name), *cells, "yes" if row.exact else f"no: {row.method}")
        return table

    def correlation_table(self) -> Table:
        """Return a rich table of the rank correlations with the outcome; empty without outcomes."""
        return correlation_table(self.correlations, self.outcome_name)

    def _shown(self, measure: str, name: str) -> str:
        """Return a number, with a mark where it differs from the reference's by less than two standard errors."""
        text = self.models[name].shown(measure)
        if name == self.reference or text == "-":
            return text
        found = self.difference(measure, name)
        return text if found.is_clear else f"{text} ≈" if found.is_known else f"{text} ?"

    def _title(self) -> str:
        rows = list(self.models.values())
        layers = dict.fromkeys(named(row.layers) for row in rows)
        samples = dict.fromkeys(f"{number_of(row.num_samples, 'sample')}{_of(row.data)}" for row in rows)
        return f"{number_of(len(rows), 'model')}: flatness of {' / '.join(layers)} over {' / '.join(samples)}"

    def _sentences(self) -> list[str]:
        """Return the sentences under the table: the verdict, the cautions, and how to read the numbers."""
        pairs = "of the same samples" if self.is_paired else "as if of different samples"
        return [
            self.verdict,
            *(f"CAUTION: {caution.sentence}" for caution in self.cautions),
            "Lower is flatter. Compare networks by the normalised measure. ±: standard error. ≈: differs from "
            f"{self.reference} by less than two standard errors of the difference, {pairs}.",
        ]

    def __str__(self) -> str:
        return as_text(self.table()) + (as_text(self.correlation_table()) if self.correlations else "")

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


def _is_known(row: ComparedModel, key: str) -> bool:
    return not math.isnan(getattr(row, key))


def _of(data: str) -> str:
    return f" of {data} data" if data in ("val", "train") else f" of {data}" if data else ""


def _root(variance: float) -> float:
    """Return the root of a variance; zero where it is negative by rounding."""
    return math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
