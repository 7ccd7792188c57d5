"""What was certified, to be recognised on later batches: the one way in which certificates are taken again or not."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Value = TypeVar("Value")

# A value that may change with the data is certified in full at least once in so many batches.
FULL_EVERY = 16


@dataclass(frozen=True)
class Known(Generic[Value]):
    """A certified value, and the fingerprint of the batch it was certified on.

    A later batch with the same fingerprint need not be certified in full.

    Args:
        value: what was certified.
        fingerprint: what later batches are compared by; None where nothing tells batches apart, so that every batch is
            certified in full.
        batches: that were recognised since.

    Example:
        >>> known = Known(1.0, fingerprint="relu, mean")
        >>> known.recognises("relu, mean"), known.recognises("tanh, mean"), Known(1.0, None).recognises(None)
        (True, False, False)
    """

    value: Value
    fingerprint: Hashable
    batches: int = 0

    def recognises(self, fingerprint: Hashable, every: int | None = FULL_EVERY) -> bool:
        """Whether a batch with this fingerprint needs no full certificate.

        Args:
            fingerprint: of the batch.
            every: take the full certificate once in so many batches all the same; None for never.
        """
        due = every is not None and self.batches + 1 >= every
        return fingerprint is not None and fingerprint == self.fingerprint and not due

    def again(self) -> Known[Value]:
        """The same, recognised once more."""
        return replace(self, batches=self.batches + 1)
