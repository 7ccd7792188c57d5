"""How many samples of a batch are taken at a time, and what is done when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_flatness.errors import BatchError
from lightning_flatness.layers.certified import Certified


@dataclass(frozen=True)
class PartSize:
    """Samples that are taken at a time.

    Args:
        most: of one part; None as long as that is not known, so that a batch is taken whole.
        halved: whether memory ran out once.

    Example:
        >>> PartSize(most=4).next_rows(left=10, begun=True), PartSize(most=4).next_rows(left=10, begun=False)
        (4, 2)
    """

    most: int | None = None
    halved: bool = False

    def at_most(self, rows: int) -> PartSize:
        """No more than so many."""
        return replace(self, most=min(rows, self.most or rows))

    def next_rows(self, left: int, begun: bool) -> int:
        """How many samples to take of those that are left, so that parts have about the same size.

        The first part of all is half as large, since it takes some fifteen passes to certify.
        """
        if self.most is None:
            return left
        most = self.most if begun or self.halved else -(-self.most // 2)
        return -(-left // -(-left // most))

    def half_of(self, rows: int, known: Certified) -> PartSize:
        """Half as many from now on, since memory ran out for ``rows``.

        Raises:
            BatchError: that was done before, or there is only one.
        """
        if self.halved or rows == 1:
            largest = max(known.infos.values(), key=lambda info: info.memory, default=None)
            where = "" if largest is None else f" The largest layer is '{largest.name}'."
            raise BatchError(
                f"Out of memory while measuring {rows} samples at a time.{where} Measure fewer layers (layers=), or "
                "measures=('hessian_trace',), which keeps diagonals only, or give smaller batches."
            )
        return PartSize(rows // 2, halved=True)
