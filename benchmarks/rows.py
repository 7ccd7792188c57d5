"""The rows of the table of benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

# How ``ratio`` is shown: how many percent more than the other side, how many times as much, how many times faster, or
# as the exponent of a power law.
Form = Literal["percent", "times", "faster", "exponent"]


@dataclass(frozen=True)
class Row:
    """One row of the table: what is measured, against what, the measured ratio, and the goal for the ratio.

    ``ratio`` is None if there is no measurement; ``note`` then has the reason. ``goal`` is None if there is no goal.

    Example:
        >>> Row("callback", "validation", "without", "percent", 0.03).measured(1.021, "24 batches").cells()
        ('validation', 'without', '+2.1 %', '<= +3.0 %', 'yes', '24 batches')
    """

    family: str
    what: str
    against: str
    form: Form
    goal: float | None = None
    ratio: float | None = None
    note: str = ""
    raw: dict[str, list[float]] = field(default_factory=dict)
    extrapolated: bool = False  # whether the other side would have taken too long, and its time was extrapolated

    def measured(
        self, ratio: float, note: str = "", raw: dict[str, list[float]] | None = None, extrapolated: bool = False
    ) -> Row:
        """Return the row with a result. For the form ``"percent"``, give the ratio itself: 1.03 for 3 percent more."""
        ratio = ratio - 1 if self.form == "percent" else ratio
        return replace(self, ratio=ratio, note=note, raw=raw or {}, extrapolated=extrapolated)

    def failed(self, why: str) -> Row:
        """Return the row with the reason why there is no result."""
        return replace(self, note=why)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is no goal or no ratio."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.form == "faster" else self.ratio <= self.goal

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the cells: what, against, ratio, goal, met, note."""
        sign = ">=" if self.form == "faster" else "<="
        goal = "" if self.goal is None else f"{sign} {self._shown(self.goal)}"
        ratio = "" if self.ratio is None else self._shown(self.ratio)
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return self.what, self.against, ratio, goal, met, self.note

    def _shown(self, number: float) -> str:
        if self.form == "percent":
            return f"{100 * number:+.1f} %"
        if self.form == "exponent":
            return f"{number:.2f}"
        unit = "x faster" if self.form == "faster" else "x"
        return f"{number:,.0f}{unit}" if abs(number) >= 100 else f"{number:.3g}{unit}"

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary that can be written as JSON."""
        return asdict(self)
