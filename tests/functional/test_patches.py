"""Patches against torch's own unfolding, where it exists, and against convolutions, everywhere."""

import sys
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_flatness.functional import ConvolutionGeometry, patch_gram, patch_square_norms, patches

CONVOLVE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    geometry: ConvolutionGeometry
    channels: int
    input_size: tuple[int, ...]
    samples: int

    def inputs(self):
        return torch.randn(self.samples, self.channels, *self.input_size, dtype=torch.float64)


@st.composite
def cases(draw, dimensions=(1, 2, 3), groups=(1, 2, 3)):
    dims = draw(st.sampled_from(dimensions))

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel_size, dilation, padding = sizes(1, 3), sizes(1, 2), sizes(0, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    input_size = tuple(max(1, r - 2 * p) + draw(st.integers(0, 3)) for r, p in zip(reach, padding, strict=True))
    chosen = draw(st.sampled_from(groups))
    geometry = ConvolutionGeometry(kernel_size, sizes(1, 3), padding, dilation, chosen)
    return Case(geometry, chosen * draw(st.integers(1, 3)), input_size, draw(st.integers(1, 3)))


@given(case=cases(dimensions=(2,)))
def test_patches_are_torchs_unfold(case):
    g, x = case.geometry, case.inputs()
    unfolded = torch.nn.functional.unfold(x, g.kernel_size, g.dilation, g.padding, g.stride)
    expected = unfolded.unflatten(1, (g.groups, -1))
    assert_close(patches(x, g), expected, rtol=0, atol=0)


@given(case=cases())
def test_a_convolution_is_the_kernel_times_the_patches(case):
    g, x = case.geometry, case.inputs()
    weight = torch.randn(2 * g.groups, case.channels // g.groups, *g.kernel_size, dtype=torch.float64)
    output = CONVOLVE[len(g.kernel_size)](x, weight, None, g.stride, g.padding, g.dilation, g.groups)
    rows = weight.reshape(g.groups, 2, -1)
    assert_close((rows @ patches(x, g)).reshape(output.shape), output, **EXACT)


@given(case=cases())
def test_output_size_is_that_of_the_convolution(case):
    g, x = case.geometry, case.inputs()
    weight = torch.zeros(g.groups, case.channels // g.groups, *g.kernel_size, dtype=torch.float64)
    output = CONVOLVE[len(g.kernel_size)](x, weight, None, g.stride, g.padding, g.dilation, g.groups)
    assert g.output_size(case.input_size) == output.shape[2:]


@pytest.mark.parametrize("addition", [-(10**9), 4, 10**9], ids=["by pixel", "the cheaper", "by patch"])
@given(case=cases())
def test_gram_holds_the_inner_products_of_the_patches(case, addition):
    g, x = case.geometry, case.inputs()
    phi = patches(x, g)
    with patch.object(sys.modules["lightning_flatness.functional.patches"], "ADDITION", addition):
        assert_close(patch_gram(x, g), torch.einsum("ngdp,ngdq->ngpq", phi, phi), **EXACT)


@given(case=cases())
def test_square_norms_are_the_diagonal_of_the_gram(case):
    g, x = case.geometry, case.inputs()
    assert_close(patch_square_norms(x, g), patches(x, g).square().sum(2), **EXACT)
    assert_close(patch_square_norms(x, g), patch_gram(x, g).diagonal(dim1=2, dim2=3), **EXACT)


@pytest.mark.parametrize(
    ("dims", "groups", "dilation", "by_patch"),
    [
        (1, 1, 1, False),
        (2, 1, 1, False),
        (2, 2, 2, False),
        (3, 1, 1, False),
        (1, 1, 1, True),
        (2, 2, 2, True),
        (3, 1, 1, True),
    ],
)
def test_gram_by_pixel_equals_gram_by_patch(monkeypatch, dims, groups, dilation, by_patch):
    # A large stride makes patches cheaper than pixels; the way taken shows in whether the patches are built.
    stride = 3 if by_patch else 1
    g = ConvolutionGeometry((3,) * dims, (stride,) * dims, (1,) * dims, (dilation,) * dims, groups)
    x = torch.randn(2, 16 * groups, *[7 if dims == 3 else 12] * dims, dtype=torch.float64)
    phi = patches(x, g)
    built = []
    module = sys.modules["lightning_flatness.functional.patches"]
    monkeypatch.setattr(module, "patches", lambda *args: built.append(args) or phi)
    assert_close(patch_gram(x, g), phi.mT @ phi, **EXACT)
    assert bool(built) == by_patch


def test_patches_keep_the_dtype():
    geometry = ConvolutionGeometry((2,), (1,), (1,), (1,))
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 1, 5, dtype=dtype)
        assert {f(x, geometry).dtype for f in (patches, patch_gram, patch_square_norms)} == {dtype}


def test_inputs_are_not_written_to():
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    x = torch.randn(2, 1, 5)
    before = x.clone()
    patches(x, geometry), patch_gram(x, geometry), patch_square_norms(x, geometry)
    assert_close(x, before, rtol=0, atol=0)
