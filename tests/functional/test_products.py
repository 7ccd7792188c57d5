"""The closed form on a device that is not a CPU: fewer, larger products, and the same numbers."""

import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatness.functional import (
    ClassCurvature,
    ConvolutionGeometry,
    closed_form_block_traces,
    products,
    weight_gram,
)
from lightning_flatness.functional.weighting import Weighting
from tests.guarding import guards

closed_form = sys.modules["lightning_flatness.functional.closed_form"]


def random_arguments(samples, groups=1, per_group=5, classes=4):
    filters, pi = groups * per_group, torch.softmax(10 * torch.randn(samples, classes).double(), dim=1)
    return (
        torch.randn(samples, 2 * groups, 3, 3).double(),
        ConvolutionGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups),
        torch.randn(samples, filters, 3, 3).double(),
        torch.randn(classes, filters).double(),
        ClassCurvature(pi, pi),
    )


def as_on_another_device(monkeypatch):
    """Let the closed form work as on a device that is not a CPU."""
    for module, names in (
        (products, ("PRODUCT_ELEMENTS", "MOST_STRIPS")),
        (closed_form, ("FACTOR_ELEMENTS", "MOST_SAMPLES")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, {})


@pytest.mark.parametrize(("classes", "tolerance"), [(4, 0.0), (200, 1e-12)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_numbers_are_the_same_on_a_device_that_is_not_a_cpu(monkeypatch, groups, classes, tolerance):
    arguments = random_arguments(70, groups, classes=classes)
    kernel = torch.randn(5 * groups, 2, 3, 3).double()
    gram, deviations = weight_gram(kernel, groups), torch.rand(2 * groups).double()
    weighting = Weighting.of(kernel, groups, gram, deviations, by_channel=True)
    with torch.no_grad():
        expected = closed_form.closed_form_contraction(*arguments, weighting, tolerance)
        as_on_another_device(monkeypatch)
        actual = closed_form.closed_form_contraction(*arguments, weighting, tolerance)
    for one, other in zip(actual[:2], expected[:2], strict=True):
        assert_close(one, other, rtol=1e-11, atol=10 * max(tolerance, 1e-12) * float(other.abs().max()))


@guards("functional/products.py", "likes = (factors.columns[0], features[0])", "likes = (features[0],) * 2")
@pytest.mark.parametrize("side", [0, 2, 3], ids=["inputs", "slopes", "classifier"])
def test_factors_may_have_different_dtypes(side):
    arguments = random_arguments(6, per_group=9, classes=9)
    expected = closed_form_block_traces(*arguments)
    narrow = {0, 2} if side != 3 else {3}
    mixed = [one.float() if index in narrow else one for index, one in enumerate(arguments)]
    with torch.no_grad():
        assert_close(closed_form_block_traces(*mixed), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@guards("functional/products.py", "return rows.sum(0, dtype=torch.float64)", "return rows.sum(0)")
def test_a_device_that_is_not_a_cpu_sums_many_samples_in_float64(monkeypatch):
    as_on_another_device(monkeypatch)
    rows = torch.tensor([[1.0], [2.0**-30]])
    assert float(products._sum(rows)) == 1 + 2.0**-30


@guards("functional/closed_form.py", "min(chunk_size, MOST_SAMPLES.get(inputs.device.type, chunk_size))", "64")
def test_a_device_that_is_not_a_cpu_gets_no_more_operations_for_more_samples(monkeypatch):
    as_on_another_device(monkeypatch)
    numbers = []
    for samples in (64, 256):
        arguments = random_arguments(samples, per_group=150)
        with Launched() as launched, torch.no_grad():
            closed_form_block_traces(*arguments)
        numbers.append(launched.number)
    assert numbers[0] == numbers[1]


class Launched(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))
