"""Symmetric matrices of which only the upper triangle is stored.

The rows are grouped into strips. Each strip is stored from its diagonal block to the right. A matrix that is stored in
this way is called folded. It takes about half the work and half the memory of the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In computations, strips have at least so many rows.
STRIP = 128
# Stored strips have this many rows, or a sixteenth of the rows, whichever is larger.
KEPT_STRIP = 16


def strip_rows(rows: int, most: int = 16) -> int:
    """Return how many rows a strip has, in computations that cut ``rows`` rows into at most ``most`` strips."""
    return min(rows, max(STRIP, -(-rows // most)))


def kept_rows(rows: int) -> int:
    """Return how many rows a stored strip has, for a matrix with ``rows`` rows."""
    return min(rows, max(KEPT_STRIP, -(-rows // 16)))


def mirror_(upper: Tensor) -> Tensor:
    """Fill the lower triangles of matrices ``(G, S, S)`` from the upper triangles, in place."""
    size = strip_rows(upper.shape[1])
    for row in range(0, upper.shape[1], size):  # transposing the whole matrix would be slow
        rows, below = slice(row, row + size), slice(row + size, None)
        block = upper[:, rows, rows]
        upper[:, rows, rows] = block.triu() + block.triu(1).mT
        upper[:, below, rows] = upper[:, rows, below].mT
    return upper


@dataclass(frozen=True)
class Folded:
    """Either symmetric matrices ``(G, S, S)`` or diagonals ``(G, S)``.

    Diagonals are stored unchanged, matrices as strips of their upper triangles. The strips of a large matrix take
    little more than half of its memory. A matrix with at most :data:`KEPT_STRIP` rows is one strip.
    """

    strips: Tensor
    rows: int | None

    @classmethod
    def of(cls, symmetric: Tensor) -> Folded:
        """Store matrices ``(G, S, S)`` as strips of their upper triangles, or store diagonals ``(G, S)`` unchanged."""
        if symmetric.ndim == 2:
            return cls(symmetric, None)
        rows = symmetric.shape[1]
        size = kept_rows(rows)
        strips = [symmetric[:, row : row + size, row:].flatten(1) for row in range(0, rows, size)]
        return cls(torch.cat(strips, dim=1), rows)

    def __add__(self, other: Folded) -> Folded:
        return Folded(self.strips + other.strips, self.rows)

    def equal(self, other: Folded) -> bool:
        """Return whether all entries are equal to those of ``other``."""
        return torch.equal(self.strips, other.strips)

    def whole(self) -> Tensor:
        """Return the matrices ``(G, S, S)``, or the diagonals ``(G, S)``, in new memory."""
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
