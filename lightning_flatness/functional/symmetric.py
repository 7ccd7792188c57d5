"""Symmetric matrices by strips of rows, from the diagonal to the right: half the work, half the memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a strip: at least so many, and a sixteenth of all.
STRIP = 64
# The same of strips that are kept, but a thirty-second: the square blocks on the diagonal are kept whole.
KEPT_STRIP = 16


def strip_rows(rows: int) -> int:
    """Rows of one strip, where a strip is work.

    Example:
        >>> strip_rows(10), strip_rows(512), strip_rows(2048)
        (10, 64, 128)
    """
    return min(rows, max(STRIP, rows // 16))


def kept_rows(rows: int) -> int:
    """Rows of one strip, where a strip is memory.

    Example:
        >>> kept_rows(10), kept_rows(512), kept_rows(2048)
        (10, 16, 64)
    """
    return min(rows, max(KEPT_STRIP, rows // 32))


def mirror_(upper: Tensor) -> Tensor:
    """Fill the lower triangles from the upper ones, in place.

    Args:
        upper: ``(G, S, S)``; below the diagonal it may hold anything.

    Example:
        >>> mirror_(torch.tensor([[[1, 2], [7, 3]]]))
        tensor([[[1, 2],
                 [2, 3]]])
    """
    size = strip_rows(upper.shape[1])
    for row in range(0, upper.shape[1], size):  # a whole transpose is slow
        rows, below = slice(row, row + size), slice(row + size, None)
        block = upper[:, rows, rows]
        upper[:, rows, rows] = block.triu() + block.triu(1).mT
        upper[:, below, rows] = upper[:, rows, below].mT
    return upper


def folded(symmetric: Tensor) -> Tensor:
    """The strips of symmetric matrices, one after another: sums of them are sums.

    They are little more than a half of large matrices, and all of matrices of :data:`KEPT_STRIP` rows or fewer.

    Args:
        symmetric: ``(G, S, S)``.

    Returns:
        ``(G, F)``, of which :func:`unfolded` makes the matrices again.

    Example:
        >>> matrix = torch.arange(128.0)[:, None] + torch.arange(128.0)
        >>> folded(matrix[None]).shape, torch.equal(unfolded(folded(matrix[None]), 128)[0], matrix)
        (torch.Size([1, 9216]), True)
    """
    filters = symmetric.shape[1]
    size = kept_rows(filters)
    return torch.cat([symmetric[:, row : row + size, row:].flatten(1) for row in range(0, filters, size)], dim=1)


def unfolded(strips: Tensor, filters: int) -> Tensor:
    """The symmetric matrices ``(G, S, S)`` of their strips.

    Args:
        strips: from :func:`folded`.
        filters: ``S``.
    """
    matrix, size, start = strips.new_empty(len(strips), filters, filters), kept_rows(filters), 0
    for row in range(0, filters, size):
        strip = matrix[:, row : row + size, row:]
        elements = strip[0].numel()
        strip.copy_(strips[:, start : start + elements].view_as(strip))
        start += elements
    return mirror_(matrix)
