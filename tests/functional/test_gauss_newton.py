import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import ConvolutionGeometry, gauss_newton_block_traces, patches


def case(size, groups=1, filters=4, columns=3, samples=5):
    generator = torch.Generator().manual_seed(size)
    geometry = ConvolutionGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    inputs = torch.randn(samples, 4, size, size, generator=generator, dtype=torch.float64)
    delta = torch.randn(samples, columns, filters, size, size, generator=generator, dtype=torch.float64)
    return inputs, geometry, delta


def brute_force(calls, deltas):
    groups = calls[0][1].groups
    jacobian = sum(
        torch.einsum("nbgsp,ngdp->nbgsd", delta.flatten(3).unflatten(2, (groups, -1)), patches(inputs, geometry))
        for (inputs, geometry), delta in zip(calls, deltas, strict=True)
    )
    return torch.einsum("nbgsd,nbgtd->gst", jacobian, jacobian)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 9])  # few positions: by Gram matrix; many: by summed patches
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_equals_the_sum_over_columns_of_j_jt(size, groups, chunk_size):
    inputs, geometry, delta = case(size, groups)
    actual = gauss_newton_block_traces([(inputs, geometry)], [delta.unbind(1)], chunk_size=chunk_size)
    assert_close(actual, brute_force([(inputs, geometry)], [delta]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("filters", [4, 40])  # fewer and more than the entries of a patch
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kernel_size", [(1,), (3,), (3, 2), (2, 1, 3)])
def test_single_precision_has_the_same_numbers(kernel_size, diagonal, filters, groups):
    # There the sums over patches are a convolution's gradient.
    generator = torch.Generator().manual_seed(0)
    dimensions = len(kernel_size)
    geometry = ConvolutionGeometry(
        kernel_size, (2, *[1] * (dimensions - 1)), (1,) * dimensions, (2,) * dimensions, groups
    )
    size = {1: (60,), 2: (14, 15), 3: (9, 8, 9)}[dimensions]
    inputs = torch.randn(5, 4, *size, generator=generator)
    columns = [torch.randn(5, filters, *geometry.output_size(size), generator=generator) for _ in range(3)]
    doubled = [column.double() for column in columns]
    for chunk_size in (None, 2):
        actual = gauss_newton_block_traces([(inputs, geometry)], [columns], None, diagonal, chunk_size)
        expected = gauss_newton_block_traces([(inputs.double(), geometry)], [doubled], None, diagonal, chunk_size)
        assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_calls_of_a_shared_layer_add_up_inside_j():
    calls, deltas = [], []
    for size in (2, 3):
        inputs, geometry, delta = case(size)
        calls.append((inputs, geometry))
        deltas.append(delta)
    actual = gauss_newton_block_traces(calls, [delta.unbind(1) for delta in deltas])
    assert_close(actual, brute_force(calls, deltas), rtol=1e-12, atol=1e-12)
    apart = sum(gauss_newton_block_traces([call], [delta.unbind(1)]) for call, delta in zip(calls, deltas, strict=True))
    assert float((actual - apart).abs().max()) > 1.0


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [2, 9])
def test_the_diagonal_alone_is_the_diagonal(groups, size):
    inputs, geometry, delta = case(size, groups)
    actual = gauss_newton_block_traces([(inputs, geometry)], [delta.unbind(1)], diagonal=True)
    expected = gauss_newton_block_traces([(inputs, geometry)], [delta.unbind(1)]).diagonal(dim1=1, dim2=2)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_signs_of_columns_count():
    inputs, geometry, delta = case(3)
    signs = torch.ones(5, 3, dtype=torch.float64)
    signs[2:, 1] = -1
    negative = [delta[2:, 1:2].unbind(1)]
    positive = gauss_newton_block_traces([(inputs, geometry)], [delta.unbind(1)])
    apart = gauss_newton_block_traces([(inputs[2:], geometry)], negative)
    actual = gauss_newton_block_traces([(inputs, geometry)], [delta.unbind(1)], signs)
    assert_close(actual, positive - 2 * apart, rtol=1e-12, atol=1e-12)
