"""The study's own statistics: rank correlations whose errors count configurations, not networks.

Seeds of one configuration are no independent evidence on what other configurations would give. So the bootstrap draws
configurations, with all their networks, and the jackknife leaves one out at a time. Kendall's τ-b itself, partial and
granulated τ are the package's.
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
    """Values ``(m,)`` with bootstrap intervals, jackknife errors and two-sided p-values."""

    values: Array
    low: Array
    high: Array
    errors: Array
    p: Array


def signs(values: Array) -> Array:
    """Return the signs of all differences ``(n, n)``, with equal infinities equal."""
    ranks = stats.rankdata(values)
    return np.sign(ranks[:, None] - ranks[None, :])


def weighted_taus(measures: Array, outcome: Array, weights: Array, pairs: Array | None = None) -> Array:
    """Return τ-b of each of the measures ``(m, n)`` with the outcome ``(n,)`` for all weights ``(B, n)``: ``(B, m)``.

    A network of weight 2 counts as if it were there twice. ``pairs`` ``(n, n)`` are the pairs that count, by default
    all.
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
    """Return ``Σ_ij w_i M_ij w_j`` for all weights; they are whole numbers, so that float32 is exact here."""
    return ((weights.astype(np.float32) @ matrix.astype(np.float32)).astype(float) * weights).sum(1)


def drawn_weights(clusters: Sequence[object], seed: int, draws: int = DRAWS) -> Array:
    """Return how often each network counts in draws of whole clusters with replacement: ``(draws, n)``."""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    count = index.max() + 1
    chosen = np.random.default_rng(seed).integers(count, size=(draws, count))
    counts = np.stack([np.bincount(row, minlength=count) for row in chosen])
    return counts[:, index].astype(float)


def left_out_weights(clusters: Sequence[object]) -> Array:
    """Return weights that leave out one cluster at a time: ``(clusters, n)``."""
    _, index = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    return (np.arange(index.max() + 1)[:, None] != index[None, :]).astype(float)


def estimate(value: Array, drawn: Array, left_out: Array) -> Estimate:
    """Return what is known of values ``(m,)`` from those of draws ``(B, m)`` and without each cluster ``(C, m)``.

    p-values take the jackknife's error and Student's t, so they depend on no random number.
    """
    count = len(left_out)
    errors = np.sqrt((count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(value / errors), count - 1)
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return Estimate(value, low, high, errors, p)


@dataclass(frozen=True)
class Resampled:
    """τ of measures with an outcome: of the networks ``(m,)``, of draws ``(B, m)``, without each cluster ``(C, m)``."""

    value: Array
    drawn: Array
    left_out: Array

    def estimate(self) -> Estimate:
        return estimate(self.value, self.drawn, self.left_out)

    def minus(self, index: int) -> Estimate:
        """Return the differences of all τ to that of one measure, on the same networks."""
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
    """Return p-values corrected for their number (Holm 1979); NaN stay NaN and do not count."""
    p = np.asarray(p, dtype=float)
    found, known = np.full(p.shape, np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return found


def tau(x: Array, y: Array) -> float:
    return kendall_tau(ranked(x), ranked(y))


def given(x: Array, y: Array, z: Array) -> float:
    """Return partial τ of ``x`` and ``y`` given ``z``."""
    return partial_tau(ranked(x), ranked(y), ranked(z))


def ranked(values: Array) -> torch.Tensor:
    return torch.from_numpy(stats.rankdata(values))


def granulated(x: Array, y: Array, settings: Sequence[tuple[object, ...]], seeds: Sequence[object]) -> float:
    """Return granulated τ (Jiang et al. 2020) among networks of one seed, in the mean over seeds."""
    found = []
    for seed in sorted(set(seeds)):
        mine = [index for index, own in enumerate(seeds) if own == seed]
        found.append(granulated_tau(ranked(x[mine]), ranked(y[mine]), [settings[index] for index in mine]))
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


@dataclass(frozen=True)
class Reliability:
    """How well one half of the test images tells what the other half says of the same networks."""

    tau: float  # between the halves
    whole: float  # Pearson's r between the halves, stepped up to both together (Spearman and Brown 1910)
    noise: float  # standard deviation of a network's outcome that is due to the choice of test images


def reliability(one: Array, other: Array) -> Reliability:
    r = float(np.corrcoef(one, other)[0, 1])
    noise = float(np.std(one - other, ddof=1) / 2)  # what all networks share cancels in their differences
    return Reliability(tau(one, other), 2 * r / (1 + r), noise)


@dataclass(frozen=True)
class Environments:
    """Sign errors in pairs of networks that differ in one hyper-parameter, in the mean and where it is worst."""

    mean: float
    worst: float
    where: str
    number: int
    pairs: int


Pair = tuple[int, int, str]  # two networks, and the name of the environment


def environments(x: Array, y: Array, pairs: Sequence[Pair], noise: float, fewest: int = 10) -> Environments:
    """Return sign errors by environment, as Dziugaite et al. 2020 do: 0 is perfect, 0.5 a coin.

    Pairs whose outcomes differ by less than two standard deviations of the noise of a difference do not count, nor
    environments of few pairs.
    """
    found: dict[str, list[float]] = {}
    for i, j, name in pairs:
        if abs(y[j] - y[i]) > 2 * np.sqrt(2) * noise:
            found.setdefault(name, []).append((1 - np.sign(x[j] - x[i]) * np.sign(y[j] - y[i])) / 2)
    means = {name: float(np.mean(errors)) for name, errors in found.items() if len(errors) >= fewest}
    if not means:
        return Environments(float("nan"), float("nan"), "", 0, 0)
    where = max(means, key=means.__getitem__)
    number = sum(len(found[name]) for name in means)
    return Environments(float(np.mean(list(means.values()))), means[where], where, len(means), number)


def pairs_of(rows: Sequence[dict[str, str]], factors: Sequence[str]) -> list[Pair]:
    """Return all pairs of networks that agree in all factors but one, and in the seed."""
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
    """Return in how many pairs of an environment ``x`` is larger in the second network, and the number of pairs."""
    found = [bool(x[j] > x[i]) for i, j, name in pairs if name == environment]
    return sum(found), len(found)
