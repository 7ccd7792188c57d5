"""Lanczos quadrature and its criteria, against dense decompositions."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import lanczos_quadrature, spectrum_criteria
from tests.spectra import SPREAD, dense_ritz, generator, symmetric, wasserstein


def quadrature(matrix, num_steps, probe=None, seed=1):
    probe = torch.randn(len(matrix), generator=generator(seed), dtype=torch.float64) if probe is None else probe
    basis = torch.empty(num_steps, len(matrix), dtype=torch.float64)
    return lanczos_quadrature(lambda v: matrix @ v, probe, basis, generator()), basis, probe


def test_quadrature_is_the_ritz_decomposition_of_the_krylov_space():
    matrix = symmetric(SPREAD)
    ritz, _, probe = quadrature(matrix, 15)
    values, weights = dense_ritz(matrix, probe, 15)
    assert_close(ritz.values, values, rtol=1e-9, atol=1e-10)
    assert_close(ritz.weights, weights, rtol=1e-7, atol=1e-12)
    unit = probe / probe.norm()
    assert_close(ritz.rayleigh, float(unit @ matrix @ unit), rtol=1e-12, atol=0)


def test_basis_stays_orthonormal_long_after_eigenvalues_have_converged():
    _, basis, _ = quadrature(symmetric(SPREAD), 120)
    assert_close(basis @ basis.T, torch.eye(120).double(), rtol=0, atol=1e-12)


def test_quadrature_is_exact_for_polynomials_of_twice_the_steps():
    matrix = symmetric(torch.linspace(-1, 1, 60))
    ritz, _, probe = quadrature(matrix, 8)
    unit = probe / probe.norm()
    for power in range(16):
        exact = float(unit @ torch.linalg.matrix_power(matrix, power) @ unit)
        assert_close(float(ritz.weights @ ritz.values**power), exact, rtol=0, atol=1e-12)


def test_with_all_steps_the_spectrum_is_exact():
    spectrum = torch.linspace(-3, 5, 40).double()
    ritz, _, _ = quadrature(symmetric(spectrum), 64)
    assert_close(ritz.values, spectrum, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "spectrum",
    [[2.0] * 12, [0.0] * 12, [1.0] * 5 + [-3.0] * 7, [0.0] * 9 + [1.0, 2.0, 2.0], [0.0] * 30 + [1.0, 2.0, 3.0] * 15],
    ids=["identity", "zero", "two values", "low rank", "larger"],
)
def test_invariant_subspaces_leave_the_weights_right(spectrum):
    spectrum = torch.tensor(spectrum).double()
    matrix = symmetric(spectrum)
    ritz, basis, probe = quadrature(matrix, len(matrix))
    assert_close(basis @ basis.T, torch.eye(len(matrix)).double(), rtol=0, atol=1e-12)
    assert_close(ritz.values, spectrum.sort().values, rtol=0, atol=1e-10)
    values, vectors = torch.linalg.eigh(matrix)
    parts = (vectors.T @ (probe / probe.norm())) ** 2
    for value in spectrum.unique():
        of_values = ritz.weights[(ritz.values - value).abs() < 1e-6].sum()
        assert_close(of_values, parts[(values - value).abs() < 1e-6].sum(), rtol=0, atol=1e-10)
    # One Ritz value carries all the weight of an eigenspace, so that K_Hn does not depend on what came after.
    assert int((ritz.weights > 1e-12).sum()) == len(spectrum.unique())


def test_wasserstein_distance_of_known_measures():
    values, weights = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
    assert wasserstein(values, weights, torch.tensor([0.0, 1.0]).double()) == 0
    assert_close(wasserstein(values, weights, torch.tensor([0.0, 3.0]).double()), 1.0)


def test_criteria_by_hand():
    values = torch.tensor(
        [[-1.0, 0.0, 4.0], [1.0, 2.0, 4.0], [-4.0, -1.0, 1.0], [-2.0, -1.0, -0.5], [0, 0, 0]]
    ).double()
    weights = torch.tensor([[0.25, 0.5, 0.25]]).double().expand(5, 3)
    r_e, k_hn, c_t, kinds = spectrum_criteria(values, weights)
    assert_close(c_t, torch.tensor([-0.25, 0.25, -4.0, -math.inf, math.nan]).double(), equal_nan=True)
    assert_close(r_e, torch.tensor([0.25, 0.25, 4.0, math.inf, math.nan]).double(), equal_nan=True)
    third = (math.sqrt(1.0) + math.sqrt(0.5)) / math.sqrt(0.25)
    assert_close(k_hn, torch.tensor([0.5, 0.0, third, math.inf, math.nan]).double(), equal_nan=True)
    assert kinds == ["mainly positive"] * 2 + ["mainly negative"] * 2 + ["quasi-singular"]


def test_boundaries_of_the_kinds():
    weights = torch.full((3, 2), 0.5).double()
    values = torch.tensor([[-0.6, 1.0], [-0.599, 1.0], [-1.0, 1.0]]).double()
    assert spectrum_criteria(values, weights).kinds == ["mainly negative", "mainly positive", "mainly negative"]
    assert spectrum_criteria(values, weights, scale=1e-3).kinds == ["quasi-singular"] * 3
    assert spectrum_criteria(values, weights, scale=1.01e-3).kinds[0] == "mainly negative"


def test_exponent_and_what_counts_as_zero():
    values, weights = torch.tensor([[-1e-12, 1.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    assert_close(spectrum_criteria(values, weights, exponent=1.0).k_hn, torch.tensor([1e-12]).double())
    assert float(spectrum_criteria(values, weights, zero=1e-10).k_hn) == 0
