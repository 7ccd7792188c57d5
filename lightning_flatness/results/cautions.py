"""Reasons why models cannot be compared as they are, as data."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record

# What a caution may be about, in the order in which cautions are listed.
CAUTIONS = (
    "train_loss",  # training losses differ
    "train_loss_unknown",
    "layers",  # layers of different names
    "width",  # layers of different numbers of filters or features
    "depth",  # networks with different numbers of layers
    "batch_norm",  # some have it and others do not, or its statistics were never updated
    "not_exact",
    "method",
    "loss_function",
    "precision",
    "data",  # different data or samples
    "num_samples",
    "not_normalised",  # the measure that compares networks is not known
    "few_samples",  # for the errors
    "few_models",  # for rank correlations
)


@dataclass(frozen=True, repr=False)
class Caution(Record):
    """A reason why models cannot be compared as they are.

    Attributes:
        kind: what the caution is about, one word of ``lightning_flatness.results.CAUTIONS``.
        sentence: what is the matter and what follows from it, in plain words.
        models: names of the models concerned; all of them if it is about the comparison.
    """

    kind: str
    sentence: str
    models: tuple[str, ...] = ()

    def _line(self) -> str:
        return f"{self.kind}: {self.sentence}"

    def table(self) -> Table:
        """Return a rich table with the sentence."""
        table = Table("caution", "models")
        table.add_row(Text(self.sentence), Text(", ".join(self.models)))
        return table
