"""Handle errors during a measurement: all ranks raise an error together, or warn of it together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_flatness.errors import FlatnessError, in_one_line
from lightning_flatness.measure.ranks import gather

logger = logging.getLogger(__name__)


class RankErrors:
    """A store for the first error of a measurement on this rank, until all ranks handle their errors together.

    If one rank raised an error alone, the other ranks would wait for that rank forever.
    """

    def __init__(self, on_error: Literal["raise", "warn"], name: str, measured: str) -> None:
        self.on_error = on_error
        self._name, self._measured = name, measured
        self.pending: str | None = None  # message of the stored error
        self._last_warning: str | None = None

    def start_run(self) -> None:
        """Drop a pending error, and forget the last warning, so that a new run warns again."""
        self.pending = self._last_warning = None

    @contextmanager
    def kept(self, num_ranks: int) -> Iterator[None]:
        """Store an error of the ``with`` block. With one rank and ``on_error="raise"``, the error propagates instead.

        The error is stored as a string, because an exception would keep all tensors of its stack frames alive.
        """
        try:
            yield
        except Exception as error:
            if num_ranks == 1 and self.on_error == "raise":
                if not isinstance(error, FlatnessError) and hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"This happened while {self._name} was measuring.")
                raise
            self.pending = self.pending or in_one_line(error)
            logger.debug("An error while measuring flatness", exc_info=True)

    def settle(self, where: str, task: str = "") -> bool:
        """Return True if no rank has a pending error. Otherwise raise an error, or warn, on every rank.

        All ranks must call this method, because it is a collective. The message names the first rank that failed.
        It says that the measurement failed at ``where``, a point in training. With a ``task``, such as "write the
        files", it says instead that this task failed.
        """
        messages = gather(self.pending, sync=True)
        self.pending = None
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if not failed:
            self._last_warning = None
            return True
        rank, message = failed[0]
        on_rank = f" on rank {rank}" if len(messages) > 1 else ""
        if self.on_error == "raise":
            failed_at = f"could not {task}" if task else f"failed at {where}"
            raise FlatnessError(f"{self._name} {failed_at}{on_rank}: {message}")
        if message != self._last_warning:  # an error that persists gives one warning only
            lacks = f"could not {task}" if task else f"has no {self._measured} for {where}; the measurement failed"
            rank_zero_warn(f"{self._name}(on_error='warn') {lacks}{on_rank}: {message}")
        self._last_warning = message
        return False
