"""Reasons why models cannot be compared as they are, as data."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record

# What a caution may be about, in a few words, in the order in which cautions are listed.
CAUTIONS = {
    "train_loss": "training losses differ",
    "train_loss_unknown": "training loss not known",
    "layers": "layers of different names",
    "width": "layers of different widths",
    "depth": "networks of different depths",
    "batch_norm": "BatchNorm differs",
    "not_exact": "not exact",
    "method": "different methods",
    "loss_function": "different loss functions",
    "precision": "different precisions",
    "data": "different data",
    "num_samples": "different numbers of samples",
    "not_normalised": "normalised measure not known",
    "few_samples": "too few samples for errors",
    "few_models": "too few models for τ",
}
# Those about numbers that are missing, which say nothing against comparing the others.
ABOUT_NUMBERS = ("not_normalised", "few_samples", "few_models")


@dataclass(frozen=True, repr=False)
class Caution(Record):
    """A reason why models cannot be compared as they are.

    Attributes:
        kind: what the caution is about, a key of ``lightning_flatness.results.CAUTIONS``.
        sentence: what is the matter and what follows from it, in plain words.
        models: names of the models concerned; all of them if it is about the comparison.
    """

    kind: str
    sentence: str
    models: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The caution in a few words, such as ``"training losses differ"``."""
        return CAUTIONS.get(self.kind, self.kind)

    def _line(self) -> str:
        return f"{self.kind}: {self.sentence}"

    def table(self) -> Table:
        """Return a rich table with the sentence."""
        table = Table("caution", "models")
        table.add_row(Text(self.sentence), Text(", ".join(self.models)))
        return table
