"""Derivatives of the cross-entropy against autograd's."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_flatness.functional import cross_entropy_derivatives


@given(
    samples=st.integers(1, 4), classes=st.integers(2, 6), scale=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0)
)
def test_derivatives_are_autograds(samples, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    logits = scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (samples,), generator=generator)
    probabilities, residual = cross_entropy_derivatives(logits, targets)
    for f, y, pi, r in zip(logits, targets, probabilities, residual, strict=True):
        assert_close(r, jacobian(lambda f, y=y: cross_entropy(f, y), f), rtol=1e-12, atol=1e-15)
        second = hessian(lambda f, y=y: cross_entropy(f, y), f)
        assert_close(torch.diag(pi) - torch.outer(pi, pi), second, rtol=1e-12, atol=1e-15)


def test_without_targets_there_is_no_residual():
    probabilities, residual = cross_entropy_derivatives(torch.randn(3, 4))
    assert residual is None
    assert_close(probabilities.sum(1), torch.ones(3, dtype=torch.float64))


def test_labels_do_not_change_the_probabilities():
    logits = torch.randn(3, 4)
    with_labels, _ = cross_entropy_derivatives(logits, torch.tensor([0, 1, 2]))
    assert_close(with_labels, cross_entropy_derivatives(logits)[0], rtol=0, atol=0)


def test_float32_logits_are_taken_in_float64():
    logits = 5 * torch.randn(3, 4)
    targets = torch.tensor([0, 1, 2])
    for found, expected in zip(
        cross_entropy_derivatives(logits, targets), cross_entropy_derivatives(logits.double(), targets), strict=True
    ):
        assert_close(found, expected, rtol=0, atol=0)


def test_confident_logits_keep_their_digits():
    # 1 - π is 2e-40 / (1 + 2e-40) here; as a difference it would be zero.
    logits = torch.tensor([[40 * math.log(10), 0.0, 0.0]], dtype=torch.float64)
    probabilities, residual = cross_entropy_derivatives(logits, torch.tensor([0]))
    assert_close(residual, torch.tensor([[-2e-40, 1e-40, 1e-40]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(probabilities[0, 1:], torch.tensor([1e-40, 1e-40], dtype=torch.float64), rtol=1e-12, atol=0)


def test_confident_and_wrong():
    residual = cross_entropy_derivatives(torch.tensor([[90.0, 0.0]]), torch.tensor([1]))[1]
    assert_close(residual, torch.tensor([[1.0, -1.0]], dtype=torch.float64), rtol=1e-12, atol=0)


def test_huge_logits_do_not_overflow():
    probabilities, residual = cross_entropy_derivatives(torch.tensor([[3e38, 0.0, -3e38]]), torch.tensor([0]))
    assert_close(probabilities, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), rtol=0, atol=0)
    assert_close(residual, torch.zeros(1, 3, dtype=torch.float64), rtol=0, atol=0)


def test_a_common_shift_of_the_logits_changes_nothing():
    logits, targets = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    for found, expected in zip(
        cross_entropy_derivatives(logits + 7, targets), cross_entropy_derivatives(logits, targets), strict=True
    ):
        assert_close(found, expected, rtol=1e-12, atol=1e-15)
