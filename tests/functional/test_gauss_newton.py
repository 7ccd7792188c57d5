import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import (
    ConvolutionGeometry,
    cross_entropy_column,
    gauss_newton_block_traces,
    patches,
)


def case(size, groups=1, filters=4, columns=3, samples=5):
    generator = torch.Generator().manual_seed(size)
    geometry = ConvolutionGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    inputs = torch.randn(samples, 4, size, size, generator=generator, dtype=torch.float64)
    delta = torch.randn(columns, samples, filters, size, size, generator=generator, dtype=torch.float64)
    return inputs, geometry, delta


def brute_force(calls, deltas):
    groups = calls[0][1].groups
    jacobian = sum(
        torch.einsum("bngsp,ngdp->bngsd", delta.flatten(3).unflatten(2, (groups, -1)), patches(inputs, geometry))
        for (inputs, geometry), delta in zip(calls, deltas, strict=True)
    )
    return torch.einsum("bngsd,bngtd->gst", jacobian, jacobian)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 9])  # few positions: by Gram matrix; many: by summed patches
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_equals_the_sum_over_columns_of_j_jt(size, groups, chunk_size):
    inputs, geometry, delta = case(size, groups)
    found = gauss_newton_block_traces([(inputs, geometry)], [delta], chunk_size)
    assert_close(found, brute_force([(inputs, geometry)], [delta]), rtol=1e-12, atol=1e-12)


def test_calls_of_a_shared_layer_add_up_inside_j():
    calls, deltas = [], []
    for size in (2, 3):
        inputs, geometry, delta = case(size)
        calls.append((inputs, geometry))
        deltas.append(delta)
    found = gauss_newton_block_traces(calls, deltas)
    assert_close(found, brute_force(calls, deltas), rtol=1e-12, atol=1e-12)
    apart = sum(gauss_newton_block_traces([call], [delta]) for call, delta in zip(calls, deltas, strict=True))
    assert float((found - apart).abs().max()) > 1.0


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_columns_are_a_factor_of_the_curvature(classes, scale):
    pi = torch.softmax(scale * torch.randn(6, classes, dtype=torch.float64), dim=1)
    factor = torch.stack([cross_entropy_column(pi, index) for index in range(classes - 1)], dim=2)
    expected = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    assert_close(factor @ factor.mT, expected, rtol=1e-10, atol=1e-15)
