"""Rank correlations between measures and an outcome, as frozen dataclasses, and their table.

Every model has an outcome, i.e. a number that flatness is expected to predict, such as the test loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import number_of

MEASURES = {
    "normalized_relative_flatness": "normalised",
    "relative_flatness": "rel. flatness",
    "relative_flatness_per_loss": "rel. / loss",
    "relative_flatness_per_curvature": "rel. / curvature",
    "hessian_trace": "Hessian trace",
}
"""The measures of a comparison and their headings in tables. The verdict uses only the first measure."""

# Networks are compared by this measure, because it does not change if channels are rescaled in a way that leaves the
# function of the network the same (docs/theory.md, "Invariance").
BEST = "normalized_relative_flatness"
BASELINES = {
    "train_loss": "train loss",
    "weight_norm": "‖W‖",
    "margin": "margin",
    "feature_spread": "features x spread",
}
"""Baselines, i.e. numbers that need no Hessian, for comparison with the measures; and their headings in tables."""


@dataclass(frozen=True, repr=False, eq=False)
class RankCorrelation(Record):
    """Kendall's τ between one number and the outcome, over the models of a comparison.

    τ is 1 if the number and the outcome put the models in the same order, and -1 if one order is the reverse of the
    other. It is near 0 if the orders are unrelated, and NaN if all models have the same number or the same outcome.

    Attributes:
        measure: name of the number, which is a field of :class:`ComparedModel`.
        tau: Kendall's τ-b.
        low: lower end of the 95 % bootstrap interval over models.
        high: upper end of the 95 % bootstrap interval over models.
        given: mapping from ``"train_loss"`` and ``"weight_norm"`` to the partial τ with this number held constant.
        granulated: mean τ among models that differ in one hyper-parameter only (Jiang et al. 2020); NaN if
            hyper-parameters are not known.
        is_baseline: whether the number is a baseline, which needs no Hessian.
        num_models: number of models that have both the number and an outcome.

    Example:
        >>> RankCorrelation("relative_flatness", 0.6, 0.1, 0.9, {}, math.nan, is_baseline=False, num_models=12)
        RankCorrelation(relative_flatness: τ 0.60 [0.10, 0.90], 12 models)
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
        """The bootstrap interval as text, such as ``"[-0.12, 0.60]"``; empty if there is no interval."""
        return "" if math.isnan(self.low) else f"[{self.low:.2f}, {self.high:.2f}]"

    def _line(self) -> str:
        return (
            f"{self.measure}: τ {_tau(self.tau)} {self.interval}".rstrip() + f", {number_of(self.num_models, 'model')}"
        )

    def table(self) -> Table:
        """Return a ``rich`` table of the correlation."""
        return correlation_table([self], "the outcome")


def _tau(value: float) -> str:
    """Return a value of τ as text, or a dash if it is NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def correlation_table(correlations: Sequence[RankCorrelation], outcome: str) -> Table:
    """Return a ``rich`` table with a row for every correlation.

    The caption says how to read the correlations, and what must not be concluded. ``outcome`` is the name of the
    outcome.
    """
    headings = MEASURES | BASELINES
    granulated = any(not math.isnan(found.granulated) for found in correlations)
    largest = max(found.num_models for found in correlations)
    sentences = [
        f"{number_of(len(correlations), 'number')} tried on {number_of(largest, 'model')}: the best of so many looks "
        "better than it is. 1: the same order as the outcome; 0: unrelated; -1: reversed. Interval: bootstrap over "
        "models. Given: partial τ, with that number held constant. *: baseline, which needs no Hessian."
    ]
    if largest < 5:
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
