"""Statistics of the study: rank correlations with errors that account for configurations.

Networks that differ in their seed alone are not independent evidence, so all networks of a configuration are one
cluster. The bootstrap draws clusters, and the jackknife leaves out one cluster at a time. The functions for Kendall's
τ-b, partial τ and granulated τ come from the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from lightning_flatness.functional.rank_correlation import granulated_tau, kendall_tau, partial_tau

Array = np.ndarray
DRAWS = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """Values ``(m,)`` with bootstrap intervals from ``low`` to ``high``, jackknife errors, and two-sided p-values."""

    values: Array
    low: Array
    high: Array
    errors: Array
    p: Array


def signs(values: Array) -> Array:
    """Return the signs of all differences between values, ``(n, n)``; equal infinities have the difference zero."""
    ranks = stats.rankdata(values)
    return np.sign(ranks[:, None] - ranks[None, :])


def weighted_taus(measures: Array, outcome: Array, weights: Array, pairs: Array | None = None) -> Array:
    """Compute Kendall's τ-b between ``m`` measures and an outcome of ``n`` networks, for ``B`` sets of weights.

    Args:
        measures: the measures, ``(m, n)``.
        outcome: the outcome, ``(n,)``.
        weights: the weights of the networks, ``(B, n)``. A network with weight 2 counts as two equal networks.
        pairs: a matrix ``(n, n)`` with 1 for every pair that counts and 0 for the others; by default all count.

    Returns:
        The values of τ-b, ``(B, m)``.
    """
    mask = 1 - np.eye(len(outcome)) if pairs is None else pairs * (1 - np.eye(len(outcome)))
    of_outcome, every = signs(outcome) * mask, _sums(mask, weights)
    of_pairs = _sums(np.abs(of_outcome), weights)
    found = []
    for values in measures:
        of_values = signs(values) * mask
        untied = every if len(np.unique(values)) == len(values) else _sums(np.abs(of_values), weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(_sums(of_values * of_outcome, weights) / np.sqrt(untied * of_pairs))
    return np.stack(found, axis=1)


def _sums(matrix: Array, weights: Array) -> Array:
    """Return ``Σ_ij w_i M_ij w_j`` with the matrix ``M``, for each row ``w`` of the weights.

    Float32 is exact here because weights and entries are whole numbers.
    """
    return ((weights.astype(np.float32) @ matrix.astype(np.float32)).astype(float) * weights).sum(1)


def drawn_weights(clusters: Sequence[object], seed: int, draws: int = DRAWS) -> Array:
    """Draw clusters with replacement, and return how often each network was drawn, ``(draws, n)``."""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    count = index.max() + 1
    chosen = np.random.default_rng(seed).integers(count, size=(draws, count))
    counts = np.stack([np.bincount(row, minlength=count) for row in chosen])
    return counts[:, index].astype(float)


def left_out_weights(clusters: Sequence[object]) -> Array:
    """Return weights 0 and 1 of the networks; each row leaves out one cluster, ``(clusters, n)``."""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    return (np.arange(index.max() + 1)[:, None] != index[None, :]).astype(float)


def estimate(value: Array, drawn: Array, left_out: Array) -> Estimate:
    """Compute intervals, errors and p-values of ``m`` values.

    Args:
        value: the values of all networks, ``(m,)``.
        drawn: the values for each draw of the bootstrap, ``(B, m)``, which give the intervals.
        left_out: the values without each of the ``C`` clusters, ``(C, m)``, which give the jackknife errors.

    The p-values use the jackknife errors and Student's t, so they do not depend on random numbers.
    """
    count = len(left_out)
    errors = np.sqrt((count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(value / errors), count - 1)
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return Estimate(value, low, high, errors, p)


@dataclass(frozen=True)
class Resampled:
    """Values of τ between ``m`` measures and an outcome.

    ``value`` ``(m,)`` is for all networks, ``drawn`` ``(B, m)`` for each draw of the bootstrap, and ``left_out``
    ``(C, m)`` without each of the ``C`` clusters.
    """

    value: Array
    drawn: Array
    left_out: Array

    def estimate(self) -> Estimate:
        return estimate(self.value, self.drawn, self.left_out)

    def minus(self, index: int) -> Estimate:
        """Return τ of every measure minus τ of the measure at ``index``, with errors of these differences."""
        parts = (self.value, self.drawn, self.left_out)
        return estimate(*(part - part[..., index : index + 1] for part in parts))


def resampled(
    measures: Array, outcome: Array, clusters: Sequence[object], seed: int, pairs: Array | None = None
) -> Resampled:
    weights = np.ones((1, len(outcome))), drawn_weights(clusters, seed), left_out_weights(clusters)
    return Resampled(
        weighted_taus(measures, outcome, weights[0], pairs)[0],
        weighted_taus(measures, outcome, weights[1], pairs),
        weighted_taus(measures, outcome, weights[2], pairs),
    )


def holm(p: Array) -> Array:
    """Return p-values corrected for multiple tests (Holm 1979); NaNs stay NaN and do not count as tests."""
    p = np.asarray(p, dtype=float)
    found, known = np.full(p.shape, np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return found


def tau(x: Array, y: Array) -> float:
    return kendall_tau(ranked(x), ranked(y))


def given(x: Array, y: Array, z: Array) -> float:
    """Return the partial τ of ``x`` and ``y`` given ``z``."""
    return partial_tau(ranked(x), ranked(y), ranked(z))


def ranked(values: Array) -> torch.Tensor:
    return torch.from_numpy(stats.rankdata(values))


def granulated(x: Array, y: Array, settings: Sequence[tuple[object, ...]], seeds: Sequence[object]) -> float:
    """Return granulated τ (Jiang et al. 2020), computed among networks with the same seed and averaged over seeds."""
    found = []
    for seed in sorted(set(seeds)):
        mine = [index for index, own in enumerate(seeds) if own == seed]
        found.append(granulated_tau(ranked(x[mine]), ranked(y[mine]), [settings[index] for index in mine]))
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


@dataclass(frozen=True)
class Reliability:
    """How well an outcome on one half of the test images agrees with the outcome on the other half."""

    tau: float  # between the halves
    whole: float  # Pearson's r between the halves, extrapolated to all test images (Spearman and Brown 1910)
    noise: float  # standard deviation of a network's outcome that is due to the choice of test images


def reliability(one: Array, other: Array) -> Reliability:
    r = float(np.corrcoef(one, other)[0, 1])
    noise = float(np.std(one - other, ddof=1) / 2)  # an error that all networks have in common does not count
    return Reliability(tau(one, other), 2 * r / (1 + r), noise)


@dataclass(frozen=True)
class Environments:
    """Sign errors: the mean over environments, and the worst environment.

    An environment is a set of pairs of networks that differ in one hyper-parameter alone, with the same two values of
    it. The sign error is the share of pairs that a measure puts in the wrong order. ``where`` names the worst
    environment, and ``worst_pairs`` counts its pairs. ``number`` counts environments, and ``pairs`` the pairs in them.
    """

    mean: float
    worst: float
    where: str
    worst_pairs: int
    number: int
    pairs: int


def constant_rule(y: Array, pairs: Sequence[Pair], noise: float, fewest: int = 10) -> float:
    """Return the mean sign error of a rule that names the same value of the hyper-parameter in all pairs.

    In every environment it is the better of the two values, found by looking. The pairs are those of
    :func:`environments`.
    """
    shares = [np.mean([y[j] > y[i] for i, j in mine]) for mine in clear_pairs(y, pairs, noise, fewest).values()]
    return float(np.mean([min(share, 1 - share) for share in shares])) if shares else float("nan")


Pair = tuple[int, int, str]  # the indices of two networks, and the name of the environment


def environments(x: Array, y: Array, pairs: Sequence[Pair], noise: float, fewest: int = 10) -> Environments:
    """Return sign errors of the measure ``x`` for the outcome ``y``, as in Dziugaite et al. 2020.

    A sign error of 0 is perfect, and 0.5 is as good as a coin. A pair counts only if its outcomes differ by more than
    two standard deviations of the noise in their difference; ``noise`` is the standard deviation of one outcome. An
    environment counts only if it has at least ``fewest`` such pairs.
    """
    found = clear_pairs(y, pairs, noise, fewest)
    if not found:
        return Environments(float("nan"), float("nan"), "", 0, 0, 0)
    means = {
        name: float(np.mean([(1 - np.sign(x[j] - x[i]) * np.sign(y[j] - y[i])) / 2 for i, j in mine]))
        for name, mine in found.items()
    }
    where = max(means, key=means.__getitem__)
    mean, number = float(np.mean(list(means.values()))), sum(map(len, found.values()))
    return Environments(mean, means[where], where, len(found[where]), len(means), number)


def clear_pairs(y: Array, pairs: Sequence[Pair], noise: float, fewest: int) -> dict[str, list[tuple[int, int]]]:
    """Return the pairs that :func:`environments` counts, by the name of their environment."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, j, name in pairs:
        if abs(y[j] - y[i]) > 2 * np.sqrt(2) * noise:
            found.setdefault(name, []).append((i, j))
    return {name: mine for name, mine in found.items() if len(mine) >= fewest}


def pairs_of(rows: Sequence[dict[str, str]], factors: Sequence[str]) -> list[Pair]:
    """Return all pairs of networks that have the same seed and differ in exactly one factor."""
    found = []
    for factor in factors:
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, row in enumerate(rows):
            held = tuple(row[key] for key in (*factors, "seed") if key != factor)
            groups.setdefault(held, []).append(index)
        for group in groups.values():
            ordered = sorted(group, key=lambda index: sortable(rows[index][factor]))
            values = [rows[index][factor] for index in ordered]
            found += [
                (ordered[i], ordered[j], f"{factor} {values[i]} to {values[j]}")
                for i in range(len(ordered))
                for j in range(i + 1, len(ordered))
                if values[i] != values[j]
            ]
    return found


def sortable(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def matched(x: Array, pairs: Sequence[Pair], environment: str) -> tuple[int, int]:
    """Return in how many pairs of an environment ``x`` is larger for the second network, and the number of pairs."""
    found = [bool(x[j] > x[i]) for i, j, name in pairs if name == environment]
    return sum(found), len(found)
