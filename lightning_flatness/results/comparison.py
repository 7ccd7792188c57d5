"""The comparison of several models, as frozen dataclasses: a row for every model, differences, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.cautions import ABOUT_NUMBERS, FEW_SAMPLES, Caution
from lightning_flatness.results.comparison_tables import as_page, decision_table, measures_table
from lightning_flatness.results.rank_correlation import BASELINES, BEST, MEASURES, RankCorrelation, correlation_table
from lightning_flatness.results.records import Record, flat
from lightning_flatness.results.texts import as_text, measured, named

# A difference is called clear if its absolute value is more than this number of standard errors of the difference.
CLEAR = 2.0


@dataclass(frozen=True, repr=False)
class Difference(Record):
    """Difference and ratio of one number between a model and the reference model, with standard errors.

    Attributes:
        value: the model's number minus the reference's number.
        error: standard error of ``value``. It comes from the choice of samples and from random estimates, such as
            probes. NaN if not known, e.g. with too few samples.
        ratio: the model's number divided by the reference's number; NaN unless the reference's number is positive.
        ratio_error: standard error of ``ratio``, by first-order propagation of errors; NaN if not known.
        is_paired: whether the errors take into account that both models were measured on the same samples.

    Example:
        >>> difference = Difference(value=0.5, error=0.1, ratio=1.5, ratio_error=0.1, is_paired=True)
        >>> difference.is_known, difference.is_clear
        (True, True)
        >>> difference
        Difference(0.50 ± 0.10, 1.50 ± 0.10 times, clear)
    """

    value: float
    error: float
    ratio: float
    ratio_error: float
    is_paired: bool

    @property
    def is_known(self) -> bool:
        """Whether the difference and its standard error are finite; otherwise :attr:`is_clear` is always False."""
        return math.isfinite(self.value) and math.isfinite(self.error)

    @property
    def is_clear(self) -> bool:
        """Whether the absolute difference is more than two standard errors; False if the error is not known."""
        return self.is_known and abs(self.value) > CLEAR * self.error

    def _line(self) -> str:
        clear = "clear" if self.is_clear else "not clear" if self.is_known else "of unknown error"
        return f"{measured(self.value, self.error)}, {measured(self.ratio, self.ratio_error)} times, {clear}"

    def table(self) -> Table:
        """Return a ``rich`` table of the difference and the ratio."""
        table = Table("difference", "ratio", "larger than two standard errors")
        clear = "yes" if self.is_clear else "no" if self.is_known else "not known"
        table.add_row(measured(self.value, self.error), measured(self.ratio, self.ratio_error), clear)
        return table


@dataclass(frozen=True, repr=False, eq=False)
class ComparedModel(Record):
    """One row of a comparison: the numbers of one model, and how they were measured. Unknown numbers are NaN.

    Attributes:
        name: name of the model.
        loss: mean loss over the measured samples.
        accuracy: share of the measured samples whose target class has the largest logit.
        normalized_relative_flatness: sum of the normalised relative flatness of the layers, in units of the loss.
        relative_flatness: sum of the relative flatness of the layers, in units of the loss.
        relative_flatness_per_loss: relative flatness divided by the mean loss.
        relative_flatness_per_curvature: relative flatness divided by the mean trace of the loss's second derivative
            with respect to the logits.
        hessian_trace: sum of the Hessian traces of the layers, in loss per squared weight.
        weight_norm: Frobenius norm of all measured kernels together.
        exact: whether checks against autograd certify that the numbers of every layer are those of the exact Hessian.
        method: the methods by which the layers were measured, such as ``"closed_form"``, separated by commas.
        precision: lowest precision that a layer was measured in.
        loss_name: name of the loss, as in :class:`FlatnessReport`.
        data: description of the data, such as ``"val"`` or ``"train"``; empty if not known.
        num_samples: number of samples that were measured.
        train_loss: mean loss over training data.
        margin: mean over samples of the difference between the target's logit and the largest other logit.
        feature_spread: mean over samples of ``‖g‖²``, times the mean over classes of ``‖w_k - w̄‖²``. ``g`` is the
            input of the linear classifier, ``w_k`` is a row of its weight, and ``w̄`` is the mean row.
        outcome: the number that flatness is expected to predict, such as a generalisation gap; given by the user.
        errors: mapping from a number's name, such as ``"loss"``, to its standard error. Errors come from the choice of
            samples and from random estimates, such as probes.
        layers: names of the measured layers.
        filters: number of filters of each measured layer.
        features: number of weights per filter, for each measured layer.
        num_classes: number of columns of the logits; 0 if not known.
        depth: number of convolutions and linear layers of the whole network; 0 if not known.
        batch_norms: number of BatchNorm layers of the whole network.
        fresh_batch_norms: number of BatchNorm layers whose running statistics were never updated.
        reasons: reasons why the numbers are not exact; empty if they are exact.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> nets = {name: torch.nn.Sequential(torch.nn.Linear(4, 3)) for name in "ab"}
        >>> row = lf.compare(nets, [(torch.randn(64, 4), torch.arange(64) % 3)], layers="0").models["a"]
        >>> row.name, row.layers, row.filters, row.features, row.num_samples
        ('a', ('0',), (3,), (4,), 64)
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
    num_classes: int = 0
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
        """Return a ``rich`` table of the model's numbers."""
        table = Table("number", "value", title=self.name)
        for name, heading in (MEASURES | BASELINES | {"accuracy": "accuracy"}).items():
            table.add_row(heading, self.shown(name))
        return table


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Record):
    """Comparison of models by the flatness of one or several layers; ``print(comparison)`` shows a table.

    Lower is flatter. Read ``cautions`` first: they say what must not be concluded. Every model is compared with the
    first model, which is called the reference.

    Attributes:
        models: mapping from names of models to their rows, in the order in which the models were given.
        cautions: problems that limit what can be concluded from the comparison.
        covariances: mapping from a number's name to a covariance matrix, float64 ``(M, M)`` for ``M`` models. Entry
            ``[i, j]`` is the covariance between the number's errors in models ``i`` and ``j``. Unless ``is_paired``,
            entries with ``i != j`` are zero.
        is_paired: whether all models are known to be measured on the same samples. If so, the errors of differences
            take the covariances of the models into account.
        correlations: rank correlations of each number with the outcome, which is the number that flatness is expected
            to predict; empty without outcomes.
        outcome_name: name of the outcome.

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
        """Name of the first model, with which the other models are compared."""
        return next(iter(self.models))

    @property
    def exact(self) -> bool:
        """Whether checks against autograd certify that the numbers of all models are those of the exact Hessian."""
        return all(model.exact for model in self.models.values())

    @property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """``differences[name][number]`` is the difference in one number between model ``name`` and the first model."""
        numbers = ("loss", "accuracy", *MEASURES)
        return {
            name: {number: self.difference(number, name) for number in numbers}
            for name in self.models
            if name != self.reference
        }

    @property
    def verdict(self) -> str:
        """Sentences that name the model with the lowest normalised relative flatness, or say why none can be named.

        If this model differs clearly from all others, the sentences state how much larger the second lowest value is.
        Otherwise they speak of a tie, or say that the errors of differences are not known. If there are cautions
        against comparing the models, the last sentence lists them.
        """
        return self._found + self._doubt

    @property
    def _doubt(self) -> str:
        """A sentence with the reasons against comparing the models; an empty string if there are no such reasons."""
        kinds = [caution for caution in self.cautions if caution.kind not in ABOUT_NUMBERS]
        if not kinds:
            return ""
        return f" But the models cannot be compared as they are: {', '.join(dict.fromkeys(c.short for c in kinds))}."

    @property
    def _found(self) -> str:
        """Sentences on which model has the lowest normalised relative flatness, and on how sure this is."""
        values = {name: model.normalized_relative_flatness for name, model in self.models.items()}
        order = sorted((name for name, value in values.items() if math.isfinite(value)), key=values.__getitem__)
        if len(order) < 2:
            return "The normalised measure is known for fewer than two models, so no model can be called the flattest."
        lowest, second = order[:2]
        alike = [name for name in order if values[name] == values[lowest]]
        if len(alike) == len(order):
            return f"No difference: the normalised flatness of {named(alike)} is the same."
        others = {name: self.difference(BEST, name, lowest) for name in order[1:]}
        unknown = [name for name, found in others.items() if not found.is_known]
        tied = [name for name, found in others.items() if found.is_known and not found.is_clear]
        if tied or unknown:
            return self._unsure(lowest, tied, unknown)
        found = others[second]
        factor = f" ({measured(found.ratio, found.ratio_error)} times)" if found.ratio > 0 else ""
        return (
            f"{lowest} is {'the flattest' if len(order) > 2 else 'flatter'} by the normalised measure. The value of "
            f"{second} is larger by {measured(found.value, found.error)}{factor}: a clear difference, of "
            f"{_standard_errors(found)}."
        )

    def _unsure(self, lowest: str, tied: Sequence[str], unknown: Sequence[str]) -> str:
        """Return the verdict if the lead of ``lowest`` over other models is not clear (``tied``) or ``unknown``."""
        text = f"{lowest} has the lowest normalised flatness"
        if tied:
            values = f"values of {named(tied)} are" if len(tied) > 1 else f"value of {named(tied)} is"
            text = f"A tie: {text}, and the {values} at most two standard errors higher"
        if not unknown:
            return f"{text}."
        few = "there are too few samples for reliable standard errors"
        why = "standard errors are missing" if self._has_errors else few
        return f"{text}. It is not known whether the difference from {named(unknown)} is clear, because {why}."

    @property
    def _has_errors(self) -> bool:
        """Whether the samples suffice for standard errors, i.e. there is no caution about too few samples."""
        return all(caution.kind != FEW_SAMPLES for caution in self.cautions)

    def difference(self, number: str, name: str, reference: str | None = None) -> Difference:
        """Return the difference in one number between model ``name`` and the ``reference``, by default the first model.

        ``number`` is ``"loss"``, ``"accuracy"`` or a key of :data:`~lightning_flatness.results.MEASURES`.

        Raises:
            FlatnessError: the number or a model is not known.
        """
        names = list(self.models)
        reference = self.reference if reference is None else reference
        for one in (name, reference):
            if one not in self.models:
                raise FlatnessError(f"There is no model '{one}'; the models are {named(names)}.")
        if number not in ("loss", "accuracy", *MEASURES):
            raise FlatnessError(f"number={number!r}: give 'loss', 'accuracy' or one of {', '.join(MEASURES)}.")
        value, of_reference = (float(getattr(self.models[one], number)) for one in (name, reference))
        first, second = names.index(reference), names.index(name)
        covariance = self.covariances.get(number)
        of_errors = (
            [[math.nan] * 2] * 2 if covariance is None else covariance[[first, second]][:, [first, second]].tolist()
        )
        if not self._has_errors:
            of_errors = [[math.nan] * 2] * 2
        (own, both), (_, other) = of_errors
        ratio = value / of_reference if of_reference > 0 else math.nan
        variance = other + own - 2 * both
        of_ratio = (other + ratio**2 * own - 2 * ratio * both) / of_reference**2 if of_reference > 0 else math.nan
        return Difference(value - of_reference, _root(variance), ratio, _root(of_ratio), self.is_paired)

    def table(self) -> Table:
        """Return a ``rich`` table with a row for every model, and below it the verdict and the cautions."""
        return decision_table(self)

    def tables(self) -> list[Table]:
        """Return the tables: :meth:`table`, the other measures and, if there are outcomes, the rank correlations."""
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
                row[f"{number}_ratio"], row[f"{number}_ratio_error"] = found.ratio, found.ratio_error
                row[f"{number}_is_clear"] = found.is_clear
            rows.append(row)
        return rows


def _standard_errors(found: Difference) -> str:
    """Return a clear difference in units of its standard error, as text, such as ``"3.1 standard errors"``."""
    return f"{abs(found.value) / found.error:.2g} standard errors" if found.error else "more than two standard errors"


def _root(variance: float) -> float:
    """Return the square root of a variance. The result is zero for a negative variance, which comes from rounding."""
    return math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
