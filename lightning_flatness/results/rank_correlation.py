"""How the order of models by a measure agrees with their order by an outcome, as a frozen record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import number_of

# The measures of a comparison and their headings in tables, the one that compares networks first.
MEASURES = {
    "normalized_relative_flatness": "normalised",
    "relative_flatness": "rel. flatness",
    "relative_flatness_per_loss": "rel. / loss",
    "relative_flatness_per_curvature": "rel. / curvature",
    "hessian_trace": "Hessian trace",
}
# The measure that compares networks (docs/theory.md, "Invariance").
BEST = "normalized_relative_flatness"
# Numbers that come for free, and their headings.
BASELINES = {
    "train_loss": "train loss",
    "weight_norm": "‖W‖",
    "margin": "margin",
    "feature_spread": "features x spread",
}


@dataclass(frozen=True, repr=False)
class RankCorrelation(Record):
    """How the order of the models by one number agrees with their order by the outcome: Kendall's τ.

    1 means that both orders are the same, 0 that they have nothing to do with each other, -1 that one is the reverse of
    the other. NaN stands for what cannot be told.

    Attributes:
        measure: name of the number, a field of :class:`ComparedModel`.
        tau: Kendall's τ-b.
        low, high: ends of the 95 % bootstrap interval over models.
        given: partial τ, by what is held: ``"train_loss"`` and ``"weight_norm"``.
        granulated: mean of τ among models that differ in one hyper-parameter alone (Jiang et al. 2020).
        is_baseline: whether the number comes for free, without a Hessian.
        num_models: number of models for which number and outcome are known.
    """

    measure: str
    tau: float
    low: float
    high: float
    given: Mapping[str, float]
    granulated: float
    is_baseline: bool
    num_models: int

    @property
    def interval(self) -> str:
        """The interval as text, such as ``"[-0.12, 0.60]"``; empty if there is none."""
        return "" if math.isnan(self.low) else f"[{self.low:.2f}, {self.high:.2f}]"

    def _line(self) -> str:
        return (
            f"{self.measure}: τ {_tau(self.tau)} {self.interval}".rstrip() + f", {number_of(self.num_models, 'model')}"
        )

    def table(self) -> Table:
        """Return a rich table of the correlation."""
        return correlation_table([self], "the outcome")


def _tau(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def correlation_table(correlations: Sequence[RankCorrelation], outcome: str) -> Table:
    """Return a table with a row for every number that was tried, and below it what must not be concluded."""
    headings = MEASURES | BASELINES
    granulated = any(not math.isnan(found.granulated) for found in correlations)
    largest = max(found.num_models for found in correlations)
    sentences = [
        f"{number_of(len(correlations), 'number')} tried on {number_of(largest, 'model')}: the best of so many looks "
        "better than it is. 1: the same order as the outcome; 0: none; -1: reversed. Interval: bootstrap over models. "
        "Given: partial τ. *: baseline, which needs no Hessian."
    ]
    if all(math.isnan(found.low) for found in correlations):
        sentences.append("With fewer than five models there is no interval, and nothing can be concluded.")
    if granulated:
        sentences.append("Granulated: among models that differ in one hyper-parameter alone.")
    table = Table(title=Text(f"Kendall's τ with {outcome}"), caption=" ".join(sentences), caption_justify="left")
    table.add_column("number")
    for heading in ("τ", "95 % interval", "given train loss", "given ‖W‖", *["granulated"] * granulated):
        table.add_column(heading, justify="right")
    for found in correlations:
        name = headings.get(found.measure, found.measure) + ("*" if found.is_baseline else "")
        held = [_tau(found.given.get(key, math.nan)) for key in ("train_loss", "weight_norm")]
        table.add_row(name, _tau(found.tau), found.interval or "-", *held, *[_tau(found.granulated)] * granulated)
    return table
