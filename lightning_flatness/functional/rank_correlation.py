"""Kendall's rank correlation τ of two lists, its bootstrap interval, partial τ, and τ within groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Smallest number of pairs for an interval. Four numbers have 24 orders, so two lists of four agree completely by chance
# in 4 % of cases.
FEWEST = 5
# Number of bootstrap draws.
DRAWS = 2000


def kendall_tau(x: Tensor, y: Tensor) -> float:
    """Return Kendall's τ-b of two lists ``(n,)``; NaN if a list is constant or has fewer than two numbers.

    Source: Kendall 1945, "The treatment of ties in ranking problems".

    Example:
        >>> kendall_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
        0.6666666666666666
    """
    return float(_tau(_signs(x), _signs(y)))


def partial_tau(x: Tensor, y: Tensor, z: Tensor) -> float:
    """Return the partial τ of ``x`` and ``y`` given ``z``: the correlation that remains with ``z`` held constant.

    All three lists are ``(n,)``. The result is NaN if a list is constant, or if ``z`` has the same or the reverse order
    of ``x`` or of ``y``. Source: Kendall 1942, "Partial rank correlation".

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> round(partial_tau(x, torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])), 3)
        0.632
    """
    of_both, of_x, of_y = kendall_tau(x, y), kendall_tau(x, z), kendall_tau(y, z)
    rest = (1 - of_x**2) * (1 - of_y**2)
    return float("nan") if not rest > 1e-12 else (of_both - of_x * of_y) / rest**0.5


def bootstrap_interval(x: Tensor, y: Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """Return the ends of a 95 % bootstrap interval of τ-b of two lists ``(n,)``; NaN with fewer than five pairs.

    Every draw takes ``n`` pairs of numbers with replacement. The ends of the interval are percentiles of τ-b over draws
    (Efron 1982). Draws in which a list is constant do not count.

    Example:
        >>> low, high = bootstrap_interval(torch.arange(9.0), torch.tensor([0.0, 2, 1, 3, 5, 4, 6, 8, 7]))
        >>> 0.4 < low < 0.83 < high <= 1
        True
    """
    number = len(x)
    if number < FEWEST:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(0)
    of_x, of_y = _signs(x), _signs(y)
    drawn = torch.randint(number, (draws, number), generator=generator, device="cpu")
    found = torch.cat(
        [
            _tau(*(of[some[:, :, None], some[:, None, :]] for of in (of_x, of_y)))
            for some in drawn.split(_at_once(number))
        ]
    )
    found = found[found.isfinite()]
    if not len(found):
        return float("nan"), float("nan")
    low, high = torch.quantile(found, found.new_tensor([0.025, 0.975])).tolist()
    return low, high


def granulated_tau(x: Tensor, y: Tensor, hyperparameters: Sequence[Sequence[object]]) -> float:
    """Return the mean τ among models that differ in only one hyper-parameter.

    ``hyperparameters`` has a row for each of the ``n`` models. For every hyper-parameter, τ is averaged over all groups
    of models whose other hyper-parameters agree. The result is the mean over hyper-parameters, or NaN if there are no
    such groups. Source: Jiang et al. 2020 (arXiv 1912.02178), Section 4.2.

    Example:
        >>> runs = [(0.1, 32), (0.1, 64), (0.2, 32), (0.2, 64)]
        >>> granulated_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0]), runs)
        0.5
    """
    hyperparameters = [[_hashable(value) for value in row] for row in hyperparameters]
    means = []
    for index in range(len(hyperparameters[0]) if hyperparameters else 0):
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, row in enumerate(hyperparameters):
            groups.setdefault((*row[:index], *row[index + 1 :]), []).append(number)
        found = [kendall_tau(x[group], y[group]) for group in groups.values() if len(group) > 1]
        found = [tau for tau in found if tau == tau]
        if found:
            means.append(sum(found) / len(found))
    return sum(means) / len(means) if means else float("nan")


def _hashable(value: object) -> object:
    """Return a value that can be part of a dictionary key: the value itself, or its ``repr`` if it is not hashable."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _signs(values: Tensor) -> Tensor:
    """Return the signs of the differences of all pairs of values, ``(n, n)``."""
    values = values.double()
    return (values[:, None] - values[None, :]).sign()


def _tau(of_x: Tensor, of_y: Tensor) -> Tensor:
    """Compute τ-b from the signs of the differences in two lists, each ``(..., n, n)``."""
    squares = of_x.square().sum((-2, -1)) * of_y.square().sum((-2, -1))
    return (of_x * of_y).sum((-2, -1)) / squares.sqrt()


def _at_once(number: int) -> int:
    """Return how many draws of ``number`` pairs to process at a time, so that they fit into some megabytes."""
    return max(1, 1_000_000 // number**2)
