"""Certificates: numerical checks that a layer's result is exact (``docs/theory.md``, "What is certified, and how").

Each certificate computes the same number in two ways and compares the results. If they differ, the certificate
raises an error or returns a reason. In most of these messages, "it" is the layer, and the caller puts the layer's name
in front. In the messages of ``head.py`` and ``loss.py``, "it" is the classifier.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

# The two results of a certificate may differ by at most this many machine epsilons, relative to their size.
ROUNDINGS = 1e3
# At least one in this many batches is certified in full, because a certified value may change with the data.
FULL_EVERY = 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Known(Generic[Value]):
    """A certified value and the fingerprint of the batch on which it was certified.

    The fingerprint identifies what the value depends on, such as the operations of the forward pass. A later batch with
    the same fingerprint needs no full certificate.

    Example:
        >>> known = Known(1.0, fingerprint="relu, mean")
        >>> known.recognises("relu, mean"), known.recognises("tanh, mean"), Known(1.0, None).recognises(None)
        (True, False, False)
    """

    value: Value
    fingerprint: Hashable  # if None, no later batch is recognised, so every batch is certified in full
    batches: int = 0  # number of batches recognised since the last full certificate

    def recognises(self, fingerprint: Hashable, every: int | None = FULL_EVERY) -> bool:
        """Return whether a batch has the fingerprint of the certified value, so that it needs no full certificate.

        For one in ``every`` batches the result is False even if the fingerprints are equal, so that this batch gets the
        full certificate. With ``every=None``, the fingerprints alone decide.
        """
        due = every is not None and self.batches + 1 >= every
        return fingerprint is not None and fingerprint == self.fingerprint and not due

    def again(self) -> Known[Value]:
        """Return a copy that counts one more recognised batch."""
        return replace(self, batches=self.batches + 1)
