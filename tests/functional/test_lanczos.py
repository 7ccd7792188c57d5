"""Largest eigenvalues against torch's dense eigenvalues."""

import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import largest_eigenvalues


def matrices(number, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(number, size, size, generator=generator, dtype=torch.float64)
    return root + root.mT


def product(dense):
    return lambda v: torch.einsum("bij,bj->bi", dense, v)


@pytest.mark.parametrize("size", [1, 2, 7, 20, 60])
@pytest.mark.parametrize("number", [1, 5])
def test_they_are_the_largest_of_dense_matrices(number, size):
    dense = matrices(number, size)
    start = torch.randn(number, size, dtype=torch.float64)
    largest = largest_eigenvalues(product(dense), start, tolerance=1e-7, max_products=1000)
    expected = torch.linalg.eigvalsh(dense)[:, -1]
    assert_close(largest.values, expected, rtol=1e-7, atol=1e-9)
    assert bool((largest.residuals <= 1e-6 * expected.abs().clamp_min(1e-3)).all())


def test_residuals_are_true_and_values_are_from_below():
    dense = matrices(3, 200)
    start = torch.randn(3, 200, dtype=torch.float64)
    largest = largest_eigenvalues(product(dense), start, tolerance=1e-12, max_products=12)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert largest.num_products == 12
    assert bool((largest.residuals > 1e-12 * largest.values).all())
    assert bool((largest.values <= eigenvalues[:, -1] * (1 + 1e-12)).all())
    nearest = (eigenvalues - largest.values[:, None]).abs().amin(1)
    assert bool((nearest <= largest.residuals * (1 + 1e-9)).all())


def test_restarts_come_to_the_same():
    dense = torch.diag(torch.linspace(0, 1, 3000, dtype=torch.float64))[None]
    largest = largest_eigenvalues(product(dense), torch.ones(1, 3000).double(), tolerance=1e-4, max_products=400)
    assert largest.num_products > 20
    assert float(largest.residuals) <= 1e-4
    assert 1 - 1e-3 < float(largest.values) <= 1


def test_operators_that_are_done_early_wait_for_the_others():
    dense = torch.stack([torch.zeros(50, 50), torch.diag(torch.arange(50.0)), torch.eye(50)]).double()
    start = torch.randn(3, 50, dtype=torch.float64)
    largest = largest_eigenvalues(product(dense), start, tolerance=1e-6, max_products=200)
    assert_close(largest.values, torch.tensor([0.0, 49.0, 1.0]).double(), rtol=1e-6, atol=1e-9)


def test_largest_is_not_the_largest_in_modulus():
    dense = torch.diag(torch.tensor([-5.0, 1.0, 2.0]).double())[None]
    largest = largest_eigenvalues(product(dense), torch.ones(1, 3).double(), tolerance=1e-10)
    assert_close(largest.values, torch.tensor([2.0]).double(), rtol=1e-8, atol=0)


def test_negative_matrices_and_invariant_subspaces():
    dense = torch.stack([-torch.eye(30), torch.diag(torch.tensor([-1.0] * 15 + [-2.0] * 15)), torch.zeros(30, 30)])
    start = torch.randn(3, 30, dtype=torch.float64)
    largest = largest_eigenvalues(product(dense.double()), start, tolerance=1e-9)
    assert_close(largest.values, torch.tensor([-1.0, -1.0, 0.0]).double(), rtol=1e-9, atol=1e-12)
