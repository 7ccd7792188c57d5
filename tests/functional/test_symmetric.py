"""Symmetric matrices by strips: folded they take half the memory, and sums of them are sums."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_flatness.functional import symmetric
from lightning_flatness.functional.symmetric import Folded, mirror_
from tests.guarding import guards

SIZES = [(1, 1), (3, 5), (1, 64), (2, 65), (1, 200), (1, 512)]


def random_symmetric(groups, rows, seed=0):
    matrix = torch.randn(groups, rows, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return matrix + matrix.mT


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("groups", "rows"), SIZES)
def test_unfolding_gives_the_matrices_back(groups, rows):
    matrices = random_symmetric(groups, rows)
    assert_same(Folded.of(matrices).whole(), matrices)


@pytest.mark.parametrize(("groups", "rows"), SIZES)
def test_sums_of_folded_matrices_are_sums(groups, rows):
    one, other = random_symmetric(groups, rows), random_symmetric(groups, rows, seed=1)
    assert_same((Folded.of(one) + Folded.of(other)).whole(), one + other)


@given(groups=st.integers(1, 3), rows=st.integers(1, 20), strip=st.integers(1, 25), kept=st.integers(1, 25))
def test_it_does_not_depend_on_the_strips(groups, rows, strip, kept):
    matrices = random_symmetric(groups, rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(symmetric, "STRIP", strip)
        patched.setattr(symmetric, "KEPT_STRIP", kept)
        assert_same(Folded.of(matrices).whole(), matrices)
        assert_same(mirror_(matrices.triu()), matrices)


def test_what_is_folded_does_not_share_memory():
    matrices = random_symmetric(1, 4)
    before = matrices.clone()
    Folded.of(matrices).strips.zero_()
    assert_same(matrices, before)


@pytest.mark.parametrize("rows", [256, 512, 4096])
def test_folded_matrices_are_little_more_than_a_half(rows):
    half = rows * (rows + 1) / 2
    assert half < Folded.of(torch.empty(1, rows, rows, dtype=torch.uint8)).strips.numel() < 1.07 * half


@guards("functional/symmetric.py", "upper[:, below, rows] = upper[:, rows, below].mT", "pass")
def test_the_lower_part_is_not_read():
    upper = random_symmetric(2, 150)
    below = torch.ones(150, 150, dtype=torch.bool).tril(-1)
    assert_same(mirror_(upper.masked_fill(below, torch.nan)), upper)
