"""Kendall's tau beside scipy's, and its behaviour where there is little to correlate."""

import math

import pytest
import torch

from lightning_flatness.functional.rank_correlation import bootstrap_interval, granulated_tau, kendall_tau, partial_tau


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_that_of_scipy(ties):
    stats = pytest.importorskip("scipy.stats")
    drawn = torch.Generator().manual_seed(0)
    for number in (2, 3, 5, 12, 40):
        x, y = torch.randn(2, number, generator=drawn, dtype=torch.float64)
        if ties:
            x, y = (2 * x).round(), (x + y).round()
        expected = stats.kendalltau(x.numpy(), y.numpy()).statistic
        assert kendall_tau(x, y) == pytest.approx(expected, nan_ok=True)


def test_constant_lists_have_no_tau():
    assert math.isnan(kendall_tau(torch.ones(6), torch.arange(6)))
    assert all(map(math.isnan, bootstrap_interval(torch.ones(6), torch.arange(6))))
    assert math.isnan(partial_tau(torch.arange(6), torch.arange(6), torch.arange(6)))


def test_partial_tau_takes_out_what_a_third_number_explains():
    """Both follow z, with noise of their own: they agree, and no longer so when z is held."""
    drawn = torch.Generator().manual_seed(1)
    z, first, second = torch.randn(3, 400, generator=drawn)
    x, y = z + 0.3 * first, z + 0.3 * second
    assert kendall_tau(x, y) > 0.6
    assert abs(partial_tau(x, y, z)) < 0.25
    assert partial_tau(x, x + 0.1 * second, torch.randn(400, generator=drawn)) > 0.8


def test_the_interval_covers_as_often_as_it_says():
    """Pairs of correlation 0.5 have tau 1/3."""
    drawn, covered = torch.Generator().manual_seed(2), 0
    for _ in range(60):
        x, noise = torch.randn(2, 30, generator=drawn)
        low, high = bootstrap_interval(x, 0.5 * x + 0.75**0.5 * noise, draws=100)
        covered += low <= 1 / 3 <= high
    assert 50 <= covered <= 60


def test_an_interval_is_always_the_same_and_takes_five():
    x, y = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    assert bootstrap_interval(x, y) == bootstrap_interval(x, y)
    assert all(map(math.isnan, bootstrap_interval(x[:4], y[:4])))


def test_granulated_tau_compares_only_what_differs_in_one_hyperparameter():
    """The learning rate moves both up, so they agree overall; among models of one learning rate they do not."""
    runs = [(lr, width) for lr in (1, 2, 3) for width in (10, 20)]
    x = torch.tensor([10 * lr + (width == 20) for lr, width in runs])
    y = torch.tensor([10 * lr - (width == 20) for lr, width in runs])
    assert kendall_tau(x, y) == pytest.approx(9 / 15)
    assert granulated_tau(x, y, runs) == pytest.approx((1 - 1) / 2)
    assert granulated_tau(x, y, [(lr,) for lr, _ in runs]) == pytest.approx(12 / math.sqrt(15 * 15), rel=0.3)
    assert math.isnan(granulated_tau(x, y, [(index, -index) for index in range(6)]))
