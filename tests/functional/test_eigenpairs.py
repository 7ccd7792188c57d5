"""Largest eigenvalues with eigenvectors, against dense decompositions."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import top_eigenpairs
from tests.guarding import guards
from tests.spectra import SPREAD, generator, symmetric


def eigenpairs(matrix, top_k, rows=None, **options):
    basis = torch.empty(rows or min(len(matrix), 2 * top_k + 20), len(matrix), dtype=matrix.dtype)
    return top_eigenpairs(lambda v: matrix @ v, basis, top_k, generator(3), **options)


@pytest.mark.parametrize("top_k", [1, 5, 10])
def test_eigenpairs_of_a_spectrum_like_that_of_a_network(top_k):
    matrix = symmetric(SPREAD)
    pairs = eigenpairs(matrix, top_k)
    expected = SPREAD.sort(descending=True).values[:top_k]
    assert_close(pairs.values, expected, rtol=1e-10, atol=0)
    assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(top_k).double(), rtol=0, atol=1e-10)
    residuals = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    assert_close(pairs.residuals, residuals, rtol=1e-3, atol=1e-10)
    assert bool((residuals <= 1e-6 * expected).all())


@guards("functional.eigenpairs:_missed", returns=(None, 0))
@pytest.mark.parametrize("size", [200, 40])
@pytest.mark.parametrize("copies", [2, 3, 6])
def test_repeated_eigenvalues_come_as_often_as_they_are(copies, size):
    spectrum = torch.cat([torch.full((copies,), 7.0), torch.linspace(-3, 6.5, size - copies)]).double()
    pairs = eigenpairs(symmetric(spectrum), copies + 2)
    assert_close(pairs.values, spectrum.sort(descending=True).values[: copies + 2], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "spectrum",
    [[2.0] * 12, [0.0] * 12, [-1.0] * 5 + [-3.0] * 7, [0.0] * 9 + [1.0, 2.0, 2.0], [3.0], [1.0, -2.0]],
    ids=["identity", "zero", "negative", "low rank", "one", "two"],
)
def test_eigenpairs_where_krylov_spaces_end(spectrum):
    spectrum = torch.tensor(spectrum).double()
    pairs = eigenpairs(symmetric(spectrum), 4, rows=len(spectrum))
    assert_close(pairs.values, spectrum.sort(descending=True).values[:4], rtol=0, atol=1e-10)
    assert bool((pairs.residuals <= 1e-10).all())


def test_many_restarts():
    spectrum = torch.linspace(0, 1, 300).double()  # nothing stands out
    pairs = eigenpairs(symmetric(spectrum), 3, rows=12, tolerance=1e-8, max_products=3000)
    assert_close(pairs.values, spectrum.flip(0)[:3], rtol=1e-10, atol=0)


def test_products_are_limited_and_counted():
    matrix, calls = symmetric(torch.linspace(0, 1, 300)), []

    def product(vector):
        calls.append(1)
        return matrix @ vector

    pairs = top_eigenpairs(product, torch.empty(12, 300).double(), 3, generator(), max_products=40)
    assert pairs.num_products == len(calls) == 43
    assert float(pairs.residuals.max()) > 1e-4  # and they say so


def test_eigenpairs_in_single_precision():
    matrix = symmetric(SPREAD).float()
    basis = torch.empty(40, len(matrix))
    pairs = top_eigenpairs(lambda v: matrix @ v, basis, 5, generator(), tolerance=1e-4)
    assert_close(pairs.values, SPREAD.sort(descending=True).values[:5], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "largest", [[50.0, 30.0, 30.0, 30.0, 20.0], [50.0, 49.985, 40.0], [50.0, 49.99995, 40.0]], ids=str
)
def test_none_is_missed_that_is_repeated_or_nearly_so(largest, dtype):
    """Where two eigenvalues are as near as the tolerance, the search may settle on a mixture, or on the lower one."""
    spectrum = torch.cat(
        [torch.tensor(largest).double(), SPREAD[SPREAD < 10], torch.tensor([-5.0, -5.0, -30.0]).double()]
    )
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    matrix = symmetric(spectrum).to(dtype)
    for seed in range(6, 13):
        for top_k in (1, 4):
            basis = torch.empty(2 * top_k + 20, len(matrix), dtype=dtype)
            pairs = top_eigenpairs(lambda v: matrix @ v, basis, top_k, generator(seed), tolerance)
            assert_close(pairs.values, spectrum.sort(descending=True).values[:top_k], rtol=tolerance, atol=0)


def power_iteration(matrix, top_k, tolerance=1e-3):
    """PyHessian's: every eigenvalue from a random vector, orthogonal to what is known, until it hardly changes."""
    draws, vectors, values, products = generator(), [], [], 0
    for _ in range(top_k):
        vector, before, value = torch.randn(len(matrix), generator=draws).to(matrix), math.nan, math.nan
        while not abs(value - before) <= tolerance * abs(before):
            for known in vectors:
                vector = vector - (known @ vector) * known
            vector = vector / vector.norm()
            image = matrix @ vector
            products += 1
            before, value, vector = value, float(vector @ image), image
        vectors.append(vector / vector.norm())
        values.append(value)
    return torch.tensor(values).double(), products


@pytest.mark.parametrize("top_k", [3, 5])
def test_fewer_products_than_power_iteration_and_a_smaller_error(top_k):
    outliers = torch.tensor([29.0, 20.0, 15.0, 14.0, 10.5, 9.0, 7.5, 5.0]).double()  # of a CNN trained on digits
    spectrum = torch.cat([outliers, SPREAD[SPREAD.abs() < 0.5]])
    matrix = symmetric(spectrum)
    by_power, products = power_iteration(matrix, top_k)
    pairs = eigenpairs(matrix, top_k, tolerance=1e-4)
    assert pairs.num_products < products
    expected = spectrum.sort(descending=True).values[:top_k]
    assert float((pairs.values / expected - 1).abs().max()) < 1e-6 < float((by_power / expected - 1).abs().max())


def test_an_operator_that_is_not_symmetric_is_told():
    matrix = symmetric(SPREAD)
    assert eigenpairs(matrix, 3).asymmetry < 1e-12
    matrix[0, 1] += 1.0
    assert eigenpairs(matrix, 3, max_products=60).asymmetry > 1e-4
