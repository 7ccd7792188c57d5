"""Announce a long measurement before it begins, and estimate its time after its first part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Say = Callable[[int, str], None]

LOGGER = logging.getLogger("lightning_flatness")
# An estimate of more seconds than this is logged as a warning, because Python shows warnings by default.
LONG = 60.0


@dataclass(frozen=True)
class Announcement:
    """The amount of work of a measurement, and the function that tells the user about it.

    Example:
        >>> plane = Announcement("landscape", 625, "625 points, each a pass over 512 samples", "steps=", print)
        >>> plane.begin()
        20 The landscape takes 625 points, each a pass over 512 samples.
        >>> plane.after(1, seconds=0.5)
        30 The landscape will take about 5.2 min: 625 points, each a pass over 512 samples. To make it cheaper: steps=.
    """

    name: str
    number: int  # expected number of parts, such as Hessian-vector products or points of a landscape
    parts: str  # number and kind of the parts in words
    cheaper: str  # arguments that make the measurement cheaper
    say: Say | None  # called with a logging level and a message; None for a silent measurement

    def begin(self) -> None:
        """Call ``say`` with a message that states the amount of work, ``parts``."""
        if self.say is not None:
            self.say(logging.INFO, f"The {self.name} takes {self.parts}.")

    def after(self, done: int, seconds: float) -> None:
        """Pass an estimate of the whole time to ``say``; the first ``done`` parts took ``seconds``.

        If the estimate is above ``LONG`` seconds, the message is a warning and names the arguments that save time.
        """
        estimate = seconds / done * self.number
        if self.say is None:
            return
        if estimate > LONG:
            takes = f"The {self.name} will take about {duration(estimate)}: {self.parts}."
            message = f"{takes} To make it cheaper: {self.cheaper}."
            self.say(logging.WARNING, message)
        else:
            self.say(logging.INFO, f"The {self.name} will take about {duration(estimate)}.")

    def timing_first(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that computes the same as ``function``; its first call is timed for :meth:`after`."""
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
    """Return a time as text, in seconds, minutes or hours.

    Example:
        >>> duration(0.25), duration(90), duration(7200)
        ('0.25 s', '1.5 min', '2 h')
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
