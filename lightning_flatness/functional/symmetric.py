"""Symmetric matrices by strips of rows, from the diagonal to the right: half the work, half the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a strip that is work: 64, or a sixteenth of the matrix, whichever is larger.
STRIP = 64
# Rows of a strip that is memory: 16, or a thirty-second of the matrix, whichever is larger.
KEPT_STRIP = 16


def strip_rows(rows: int) -> int:
    """Rows of one strip, where a strip is work."""
    return min(rows, max(STRIP, rows // 16))


def kept_rows(rows: int) -> int:
    """Rows of one strip, where a strip is memory."""
    return min(rows, max(KEPT_STRIP, rows // 32))


def mirror_(upper: Tensor) -> Tensor:
    """Fill the lower triangles of ``(G, S, S)`` from the upper ones, in place."""
    size = strip_rows(upper.shape[1])
    for row in range(0, upper.shape[1], size):  # a whole transpose is slow
        rows, below = slice(row, row + size), slice(row + size, None)
        block = upper[:, rows, rows]
        upper[:, rows, rows] = block.triu() + block.triu(1).mT
        upper[:, below, rows] = upper[:, rows, below].mT
    return upper


@dataclass(frozen=True)
class Folded:
    """Symmetric matrices ``(G, S, S)``, kept by the strips of their upper triangles; or diagonals, kept as they are.

    The strips are little more than a half of large matrices, and all of matrices of :data:`KEPT_STRIP` rows or fewer.
    """

    strips: Tensor
    rows: int | None

    @classmethod
    def of(cls, symmetric: Tensor) -> Folded:
        """Fold ``(G, S, S)``, of which only the upper triangles count; or take diagonals ``(G, S)``."""
        if symmetric.ndim == 2:
            return cls(symmetric, None)
        rows = symmetric.shape[1]
        size = kept_rows(rows)
        strips = [symmetric[:, row : row + size, row:].flatten(1) for row in range(0, rows, size)]
        return cls(torch.cat(strips, dim=1), rows)

    def __add__(self, other: Folded) -> Folded:
        return Folded(self.strips + other.strips, self.rows)

    def equal(self, other: Folded) -> bool:
        """Whether all entries are the same."""
        return torch.equal(self.strips, other.strips)

    def whole(self) -> Tensor:
        """The matrices ``(G, S, S)``, or the diagonals ``(G, S)``; they share no memory with this."""
        if self.rows is None:
            return self.strips.clone()
        matrix = self.strips.new_empty(len(self.strips), self.rows, self.rows)
        size, start = kept_rows(self.rows), 0
        for row in range(0, self.rows, size):
            strip = matrix[:, row : row + size, row:]
            elements = strip[0].numel()
            strip.copy_(self.strips[:, start : start + elements].view_as(strip))
            start += elements
        return mirror_(matrix)
