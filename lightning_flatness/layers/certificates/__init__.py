"""Certificates, in the order of docs/theory.md: each computes the same number in two ways and compares them.

Their messages say why a certificate fails and call the layer "it"; the caller puts the layer's name in front.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

# The largest relative difference allowed between the two ways, in units of the machine epsilon.
ROUNDINGS = 1e3
# A value that may change with the data is certified in full at least once in this many batches.
FULL_EVERY = 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Known(Generic[Value]):
    """A certified value, and the fingerprint of its batch: a later batch with the same one needs no full certificate.

    Example:
        >>> known = Known(1.0, fingerprint="relu, mean")
        >>> known.recognises("relu, mean"), known.recognises("tanh, mean"), Known(1.0, None).recognises(None)
        (True, False, False)
    """

    value: Value
    fingerprint: Hashable  # None if batches have none, so that every batch is certified in full
    batches: int = 0  # how many were recognised since the full certificate

    def recognises(self, fingerprint: Hashable, every: int | None = FULL_EVERY) -> bool:
        """Return whether a batch needs no full certificate; once in ``every`` batches it needs one in any case."""
        due = every is not None and self.batches + 1 >= every
        return fingerprint is not None and fingerprint == self.fingerprint and not due

    def again(self) -> Known[Value]:
        """Return the same value, with one more recognised batch counted."""
        return replace(self, batches=self.batches + 1)
