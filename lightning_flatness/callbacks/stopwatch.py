"""Find out how long the measurement takes, compared with the rest of the validation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lightning_flatness.measure.announcement import duration

# If measuring takes longer than MUCH times the rest of a validation, suggest max_samples= with which it takes about
# MODEST times the rest.
MUCH, MODEST = 0.2, 0.1
FEWEST = 100  # smallest max_samples= that is suggested


class Stopwatch:
    """Adds up the times of blocks of code, and tells the time since its creation.

    On a CUDA device it uses CUDA events, so that only :meth:`seconds` waits for the device.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self._elapsed = 0.0
        self._intervals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._is_running = False

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Add the time of the ``with`` block to the sum. A block within a running block adds nothing."""
        if self._is_running:
            yield
            return
        start, event, self._is_running = time.perf_counter(), _event(device), True
        try:
            yield
        finally:
            self._is_running = False
            end = _event(device)
            if event is None or end is None:
                self._elapsed += time.perf_counter() - start
            else:
                self._intervals.append((event, end))

    def seconds(self) -> float:
        """Return the sum so far, in seconds. On a CUDA device, wait until the measured blocks are done."""
        if self._intervals:
            self._intervals[-1][1].synchronize()
        self._elapsed += sum(start.elapsed_time(end) for start, end in self._intervals) / 1e3  # milliseconds
        self._intervals.clear()
        return self._elapsed

    @property
    def since_start(self) -> float:
        """Seconds since the creation of this stopwatch."""
        return time.perf_counter() - self.start

    def rest(self, clocks: Iterable[Stopwatch]) -> float:
        """Return the seconds since the creation of this stopwatch, less those that stopwatches have added up.

        ``clocks`` are this stopwatch and others. One that began more than a second earlier belongs to an earlier
        validation, and does not count.
        """
        return self.since_start - sum(one.seconds() for one in clocks if one.start > self.start - 1)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event in the current stream of a CUDA device, and return it. Return None for other devices."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def in_words(seconds: float, rest: float, samples: Sequence[int]) -> str:
    """Return a text on how long measuring took, compared with the rest of the validation.

    If measuring took long, the text suggests a number for ``max_samples=``, unless this would be below ``FEWEST``.

    Args:
        seconds: time that measuring took.
        rest: time that the validation took without measuring.
        samples: number of measured samples of each loader.

    Example:
        >>> in_words(3.1, 25.0, [5000])
        'measuring 5,000 samples took 3.1 s beside a validation of 25 s (+12 %)'
        >>> in_words(10.0, 10.0, [5000])
        'measuring 5,000 samples took 10 s beside a validation of 10 s (+100 %); max_samples=500 would make it +10 %'
    """
    total = sum(samples)
    rest = max(rest, 1e-9)
    share = 100 * seconds / rest
    sentence = (
        f"measuring {total:,} samples took {duration(seconds)} beside a validation of {duration(rest)} (+{share:.0f} %)"
    )
    if seconds <= MUCH * rest:
        return sentence
    fewer = _rounded(_of_each(samples, total * MODEST * rest / seconds))
    if fewer < FEWEST:
        return sentence
    return f"{sentence}; max_samples={fewer} would make it +{100 * MODEST:.0f} %"


def _of_each(samples: Sequence[int], total: float) -> float:
    """Return the number of samples per loader (``max_samples=``) that gives ``total`` samples over all loaders.

    Loaders that have fewer samples are measured whole. The others share the remaining samples equally.
    """
    rest = len(samples)
    for size in sorted(samples):
        if size * rest >= total:
            break
        total, rest = total - size, rest - 1
    return total / rest


def _rounded(number: float) -> int:
    """Round a number down to two significant digits."""
    scale: int = 10 ** max(0, len(str(int(number))) - 2)
    return int(number) // scale * scale
