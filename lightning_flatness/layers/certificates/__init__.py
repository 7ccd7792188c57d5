"""Certificates, in the order of docs/theory.md: each compares two ways to the same number.

What they raise or return says why a certificate fails and names no layer; the caller knows it and adds it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

# The largest relative difference allowed between the two ways, in rounding errors of the precision.
ROUNDINGS = 1e3
# A value that may change with the data is certified in full at least once in so many batches.
FULL_EVERY = 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Known(Generic[Value]):
    """A certified value, and the fingerprint of its batch: later ones with the same need not be certified in full.

    Example:
        >>> known = Known(1.0, fingerprint="relu, mean")
        >>> known.recognises("relu, mean"), known.recognises("tanh, mean"), Known(1.0, None).recognises(None)
        (True, False, False)
    """

    value: Value
    fingerprint: Hashable  # None where nothing tells batches apart, so that every batch is certified in full
    batches: int = 0  # that were recognised since

    def recognises(self, fingerprint: Hashable, every: int | None = FULL_EVERY) -> bool:
        """Whether a batch needs no full certificate; once in ``every`` batches it does all the same."""
        due = every is not None and self.batches + 1 >= every
        return fingerprint is not None and fingerprint == self.fingerprint and not due

    def again(self) -> Known[Value]:
        """The same, recognised once more."""
        return replace(self, batches=self.batches + 1)
