"""Every measure against its definition, written as loops over a dense Hessian or over filters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_flatness.functional import (
    filter_flatness,
    filter_traces,
    hessian_trace,
    layerwise_flatness,
    neuronwise_flatness,
    relative_flatness,
    weight_gram,
    weight_norm,
)

PER_GROUP, LENGTH = 3, 4


def dense(groups, seed=0):
    """A symmetric Hessian ``H[s, d, s', d']`` and a kernel ``W[s, d]``, with the block traces of the former."""
    generator = torch.Generator().manual_seed(seed)
    filters = groups * PER_GROUP
    flat = torch.randn(filters * LENGTH, filters * LENGTH, generator=generator, dtype=torch.float64)
    hessian = (flat + flat.T).reshape(filters, LENGTH, filters, LENGTH)
    weight = torch.randn(filters, LENGTH, generator=generator, dtype=torch.float64)
    block_traces = torch.zeros(groups, PER_GROUP, PER_GROUP, dtype=torch.float64)
    for s in range(filters):
        for t in range(filters):
            if s // PER_GROUP == t // PER_GROUP:
                block_traces[s // PER_GROUP, s % PER_GROUP, t % PER_GROUP] = hessian[s, :, t, :].trace()
    return hessian, weight, block_traces, weight_gram(weight, groups)


groups = pytest.mark.parametrize("groups", [1, 2, 4])


@groups
def test_weight_gram_holds_the_inner_products_within_groups(groups):
    _, weight, _, gram = dense(groups)
    assert gram.shape == (groups, PER_GROUP, PER_GROUP)
    for g in range(groups):
        for i in range(PER_GROUP):
            for j in range(PER_GROUP):
                assert_close(gram[g, i, j], weight[g * PER_GROUP + i] @ weight[g * PER_GROUP + j])


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2500])
@pytest.mark.parametrize("groups", [1, 2])
def test_long_filters_are_taken_in_parts(groups, length):
    weight = torch.randn(4, length, dtype=torch.float64)
    rows = weight.reshape(groups, 4 // groups, length)
    gram = torch.einsum("gsd,gtd->gst", rows, rows)
    assert_close(weight_gram(weight, groups), gram)
    assert_close(weight_gram(weight, groups, diagonal=True), gram.diagonal(dim1=1, dim2=2))


def test_weight_gram_of_a_kernel_is_float64_and_detached():
    kernel = torch.nn.Conv2d(4, 6, 3, groups=2).weight
    gram = weight_gram(kernel, 2)
    assert gram.dtype == torch.float64
    assert not gram.requires_grad
    assert_close(gram[1, 0, 2], (kernel[3].double() * kernel[5].double()).sum().detach())


@groups
def test_weight_norm_is_that_of_the_kernel(groups):
    _, weight, _, gram = dense(groups)
    assert_close(weight_norm(gram), weight.norm())


@groups
def test_filter_traces_are_the_traces_of_the_diagonal_blocks(groups):
    hessian, weight, block_traces, _ = dense(groups)
    expected = torch.stack([hessian[s, :, s, :].trace() for s in range(len(weight))])
    assert_close(filter_traces(block_traces), expected)


@groups
def test_hessian_trace_is_the_trace_of_the_whole_matrix(groups):
    hessian, weight, block_traces, _ = dense(groups)
    assert_close(hessian_trace(block_traces), hessian.reshape(weight.numel(), -1).trace())


@groups
def test_relative_flatness_is_definition_3_within_groups(groups):
    hessian, weight, block_traces, gram = dense(groups)
    expected = torch.zeros((), dtype=torch.float64)
    for s in range(len(weight)):
        for t in range(len(weight)):
            if s // PER_GROUP == t // PER_GROUP:
                expected += weight[s] @ weight[t] * hessian[s, :, t, :].trace()
    assert_close(relative_flatness(block_traces, gram), expected)


@groups
def test_filter_and_neuronwise_flatness(groups):
    hessian, weight, block_traces, gram = dense(groups)
    expected = torch.stack([weight[s] @ weight[s] * hessian[s, :, s, :].trace() for s in range(len(weight))])
    assert_close(filter_flatness(block_traces, gram), expected)
    assert_close(neuronwise_flatness(block_traces, gram), expected.sum())


@groups
def test_layerwise_flatness(groups):
    hessian, weight, block_traces, gram = dense(groups)
    expected = weight.square().sum() * hessian.reshape(weight.numel(), -1).trace()
    assert_close(layerwise_flatness(block_traces, gram), expected)


@given(groups=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_parts_add_up(groups, seed):
    _, _, block_traces, gram = dense(groups, seed)
    assert_close(filter_flatness(block_traces, gram).sum(), neuronwise_flatness(block_traces, gram))
    assert_close(filter_traces(block_traces).sum(), hessian_trace(block_traces))


def test_a_layer_of_one_filter_has_one_flatness():
    block_traces, gram = torch.tensor([[[3.0]]]).double(), weight_gram(torch.randn(1, 5))
    values = [measure(block_traces, gram) for measure in (relative_flatness, neuronwise_flatness, layerwise_flatness)]
    assert_close(torch.stack(values), 3 * gram.flatten().expand(3))
