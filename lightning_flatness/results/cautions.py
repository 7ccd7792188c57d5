"""The cautions of a comparison: problems that limit what can be concluded from it, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.records import Record

# The kind of the caution that is given if there are too few samples for reliable standard errors.
FEW_SAMPLES = "few_samples"

CAUTIONS = {
    "train_loss": "training losses differ",
    "train_loss_unknown": "training loss not known",
    "layers": "layers of different names",
    "width": "layers of different widths",
    "depth": "networks of different depths",
    "classes": "different numbers of classes",
    "batch_norm": "BatchNorm differs",
    "not_exact": "not exact",
    "method": "different methods",
    "loss_function": "different loss functions",
    "precision": "different precisions",
    "data": "different data",
    "num_samples": "different numbers of samples",
    "not_normalised": "normalised measure not known",
    FEW_SAMPLES: "too few samples",
    "few_models": "too few models for τ",
}
"""The kinds of cautions, each with the problem in a few words, in the order in which cautions are listed."""

# Kinds of cautions about missing numbers or standard errors, or about too few models. In spite of these cautions, the
# models can be compared by the numbers that are known.
ABOUT_NUMBERS = ("not_normalised", FEW_SAMPLES, "few_models")


@dataclass(frozen=True, repr=False)
class Caution(Record):
    """A problem that limits what can be concluded from a comparison of models.

    Attributes:
        kind: subject of the caution, a key of :data:`~lightning_flatness.results.CAUTIONS`.
        sentence: the problem, and what follows from it for the comparison.
        models: names of the models with the problem; all models if the problem is a difference between models.
        words: the problem in a few words; if empty, the words in ``CAUTIONS`` for this kind are used.

    Example:
        >>> caution = Caution("data", "The models were measured on different data.", ("a", "b"))
        >>> caution.short
        'different data'
        >>> caution
        Caution(data: The models were measured on different data.)
    """

    kind: str
    sentence: str
    models: tuple[str, ...] = ()
    words: str = ""

    @property
    def short(self) -> str:
        """The caution in a few words, such as ``"training losses differ"``."""
        return self.words or CAUTIONS.get(self.kind, self.kind)

    def _line(self) -> str:
        return f"{self.kind}: {self.sentence}"

    def table(self) -> Table:
        """Return a ``rich`` table with the sentence and the names of the models."""
        table = Table("caution", "models")
        table.add_row(Text(self.sentence), Text(", ".join(self.models)))
        return table
