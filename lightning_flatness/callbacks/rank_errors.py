"""Errors of a measurement: raised or warned about, by all ranks alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.ranks import gather

logger = logging.getLogger(__name__)


class RankErrors:
    """Keeps the first error of a measurement until all ranks can decide alike.

    A rank that raised alone would leave the others waiting for it.

    Args:
        on_error: ``"raise"``, or ``"warn"`` and go on without this measurement.
        name: of the callback, for messages.
        measured: what it measures.

    Example:
        >>> faults = RankErrors("warn")
        >>> with faults.kept(num_ranks=1):
        ...     raise FlatnessError("no memory")
        >>> bool(faults)
        True
    """

    def __init__(
        self, on_error: Literal["raise", "warn"], name: str = "FlatnessCallback", measured: str = "flatness"
    ) -> None:
        self._on_error = on_error
        self._name, self._measured = name, measured
        self._message: str | None = None
        self._warned: str | None = None

    def __bool__(self) -> bool:
        """Whether an error is kept."""
        return self._message is not None

    def clear(self) -> None:
        """Drop the error that is kept."""
        self._message = None

    def forget(self) -> None:
        """In a new run everything is told anew."""
        self._message = self._warned = None

    @contextmanager
    def kept(self, num_ranks: int) -> Iterator[None]:
        """Keep an error of the block; a process that is alone raises it at once, if it is to be raised.

        As text, since an error holds the frames it came through, and these the tensors.
        """
        try:
            yield
        except Exception as error:
            if num_ranks == 1 and self._on_error == "raise":
                if not isinstance(error, FlatnessError) and hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"This happened while {self._name} was measuring.")
                raise
            kind = "" if isinstance(error, FlatnessError) else f"{type(error).__name__}: "
            self._message = self._message or f"{kind}{error}"
            logger.debug("An error while measuring flatness", exc_info=True)

    def settled(self, where: str) -> bool:
        """Whether all went well on every rank; else raise, or warn. A collective.

        Args:
            where: in the training, for the message.

        Raises:
            FlatnessError: on every rank, naming the one that failed.
        """
        messages = gather(self._message)
        self.clear()
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if not failed:
            self._warned = None
            return True
        rank, message = failed[0]
        on_rank = f" on rank {rank}" if len(messages) > 1 else ""
        if self._on_error == "raise":
            raise FlatnessError(f"{self._name} failed at {where}{on_rank}: {message}")
        if message != self._warned:  # once for a failure that lasts
            rank_zero_warn(
                f"{self._name}(on_error='warn') has no {self._measured} for {where}; it failed{on_rank}: {message}"
            )
        self._warned = message
        return False
