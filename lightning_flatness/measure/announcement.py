"""Say what a long measurement will take, before it begins and after its first part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Say = Callable[[int, str], None]

LOGGER = logging.getLogger("lightning_flatness")
# Estimates of more seconds than this are warnings, which Python shows by default.
LONG = 60.0


@dataclass(frozen=True)
class Announcement:
    """What a measurement will take.

    Example:
        >>> plane = Announcement("landscape", 625, "625 points, each a pass over 512 samples", "steps=", print)
        >>> plane.begin()
        20 The landscape takes 625 points, each a pass over 512 samples.
        >>> plane.after(1, seconds=0.5)
        30 The landscape will take about 5.2 min: 625 points, each a pass over 512 samples. Cheaper: steps=.
    """

    name: str
    number: int  # expected number of parts, such as products or points
    parts: str  # these in words
    cheaper: str  # arguments that make it cheaper
    say: Say | None  # a function of a level of logging and a message; None says nothing

    def begin(self) -> None:
        """Say what the measurement takes."""
        if self.say is not None:
            self.say(logging.INFO, f"The {self.name} takes {self.parts}.")

    def after(self, done: int, seconds: float) -> None:
        """Say how long all will take, when the first parts are done; if that is long, also what makes it cheaper."""
        estimate = seconds / done * self.number
        if self.say is None:
            return
        if estimate > LONG:
            message = f"The {self.name} will take about {duration(estimate)}: {self.parts}. Cheaper: {self.cheaper}."
            self.say(logging.WARNING, message)
        else:
            self.say(logging.INFO, f"The {self.name} will take about {duration(estimate)}.")

    def timing_first(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that computes the same, and calls :meth:`after` when its first call is done."""
        calls: list[None] = []

        def timed(vector: Tensor) -> Tensor:
            start = time.perf_counter()
            result = function(vector)
            if not calls:
                calls.append(None)
                self.after(1, time.perf_counter() - start)
            return result

        return timed


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours.

    Example:
        >>> duration(0.25), duration(90), duration(7200)
        ('0.25 s', '1.5 min', '2 h')
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
