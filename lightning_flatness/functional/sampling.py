"""Standard errors of means over samples, from sums over groups of samples."""

from __future__ import annotations

import torch
from torch import Tensor

# Number of groups of samples. The position of a sample in the measured set determines its group.
GROUPS = 32
# The 0.975 quantiles of Student's t-distribution with 1, 2, ... 31 degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042, 2.040,
)  # fmt: skip


def grouped(values: Tensor, positions: Tensor) -> Tensor:
    """Sum ``Q`` values of every sample, ``(N, Q)``, over the samples of each group; the result is float64 ``(32, Q)``.

    ``positions`` ``(N,)`` has the position of each sample in the measured set. The sample at position ``i`` is in group
    ``i % 32``, so groups do not depend on batches or ranks.

    Example:
        >>> grouped(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 32]))[:2].flatten()
        tensor([5., 2.], dtype=torch.float64)
    """
    sums = torch.zeros(GROUPS, values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, (positions % GROUPS).to(values.device), values.double())


def sampling_errors(sums: Tensor, weights: Tensor) -> Tensor:
    """Compute the standard errors ``(Q,)`` of the means ``sum(sums) / sum(weights)`` by a jackknife over groups.

    ``sums`` ``(32, Q)`` and ``weights`` ``(32,)`` are sums of values and of sample weights over each group, from
    :func:`grouped`. Groups without samples do not count. With fewer than two groups the errors are NaN. Source: Efron
    1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 3.

    Example:
        >>> sums, weights = torch.zeros(32, 1), torch.zeros(32)
        >>> sums[:4, 0], weights[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0]), 1.0
        >>> sampling_errors(sums, weights)  # the standard deviation 1.29 over the root of 4
        tensor([0.6455], dtype=torch.float64)
    """
    without = means_without_groups(sums, weights)
    number = len(without)
    if number < 2:
        return sums.new_full(sums.shape[1:], torch.nan, dtype=torch.float64)
    return ((number - 1) / number * (without - without.mean(0)).square().sum(0)).sqrt()


def means_without_groups(sums: Tensor, weights: Tensor) -> Tensor:
    """For every group that has samples, compute the means over all other groups, float64 ``(G, Q)``.

    ``sums`` are ``(32, Q)`` and ``weights`` ``(32,)``, as :func:`grouped` returns them. ``G`` is the number of groups
    that have samples.

    Example:
        >>> sums, weights = torch.tensor([[1.0], [2.0], [6.0], [0.0]]), torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> means_without_groups(sums, weights).flatten()
        tensor([4.0000, 3.5000, 1.5000], dtype=torch.float64)
    """
    kept = weights > 0
    sums, weights = sums[kept].double(), weights[kept].double()
    return (sums.sum(0) - sums) / (weights.sum() - weights)[:, None]


def jackknife_covariance(without: Tensor) -> Tensor:
    """Compute the covariances ``(Q, Q)`` of ``Q`` means by the jackknife; NaN with fewer than two groups.

    ``without`` ``(G, Q)`` has the means without each group, from :func:`means_without_groups`. The diagonal has the
    squares of :func:`sampling_errors`. Means over the same samples are correlated, and the error of their difference
    depends on the covariance.

    Example:
        >>> jackknife_covariance(torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]))
        tensor([[ 1.3333, -1.3333],
                [-1.3333,  1.3333]])
    """
    number = len(without)
    if number < 2:
        return without.new_full((without.shape[1],) * 2, torch.nan)
    deviations = without - without.mean(0)
    return (1 - 1 / number) * deviations.T @ deviations


def largest_tenth(values: Tensor) -> float:
    """Return the share that the largest tenth of ``values`` ``(N,)`` contributes to the sum of all values.

    ``N / 10`` is rounded up. The share is NaN if a value is negative beyond rounding, or if all values are zero.

    Example:
        >>> largest_tenth(torch.tensor([8.0, *[1.0] * 9]))
        0.47058823529411764
    """
    total = float(values.double().sum())
    if not len(values) or not total > 0 or float(values.min()) < -1e-6 * float(values.max()):
        return float("nan")
    return float(values.double().sort(descending=True).values[: -(-len(values) // 10)].sum()) / total


def interval(mean: float, error: float, num_groups: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a mean from its jackknife standard error; NaN with fewer than two groups.

    Example:
        >>> interval(1.0, 0.1, 32)
        (0.796, 1.204)
    """
    half = error * T_QUANTILES[num_groups - 2] if num_groups > 1 else float("nan")
    return mean - half, mean + half
