"""Every measure against its definition, written as loops over a dense Hessian or over filters."""

import itertools

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
    for g, s, t in entries(groups):
        block_traces[g, s, t] = hessian[g * PER_GROUP + s, :, g * PER_GROUP + t, :].trace()
    return hessian, weight, block_traces, weight_gram(weight, groups)


def entries(groups):
    return itertools.product(range(groups), range(PER_GROUP), range(PER_GROUP))


groups = pytest.mark.parametrize("groups", [1, 2, 4])


@groups
def test_weight_gram_holds_the_inner_products_within_groups(groups):
    _, weight, _, gram = dense(groups)
    assert gram.shape == (groups, PER_GROUP, PER_GROUP)
    for g, s, t in entries(groups):
        assert_close(gram[g, s, t], weight[g * PER_GROUP + s] @ weight[g * PER_GROUP + t])


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
def test_measures_are_what_they_are_defined_to_be(groups):
    hessian, weight, block_traces, gram = dense(groups)
    traces = torch.stack([hessian[s, :, s, :].trace() for s in range(len(weight))])
    whole = hessian.reshape(weight.numel(), -1)
    relative = torch.zeros((), dtype=torch.float64)
    for s, t in itertools.product(range(len(weight)), repeat=2):
        if s // PER_GROUP == t // PER_GROUP:
            relative += weight[s] @ weight[t] * hessian[s, :, t, :].trace()
    assert_close(weight_norm(gram), weight.norm())
    assert_close(filter_traces(block_traces), traces)
    assert_close(hessian_trace(block_traces), whole.trace())
    assert_close(relative_flatness(block_traces, gram), relative)
    assert_close(filter_flatness(block_traces, gram), weight.square().sum(1) * traces)
    assert_close(neuronwise_flatness(block_traces, gram), (weight.square().sum(1) * traces).sum())
    assert_close(layerwise_flatness(block_traces, gram), weight.square().sum() * whole.trace())


@given(groups=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_parts_add_up(groups, seed):
    _, _, block_traces, gram = dense(groups, seed)
    assert_close(filter_flatness(block_traces, gram).sum(), neuronwise_flatness(block_traces, gram))
    assert_close(filter_traces(block_traces).sum(), hessian_trace(block_traces))


def test_a_layer_of_one_filter_has_one_flatness():
    block_traces, gram = torch.tensor([[[3.0]]]).double(), weight_gram(torch.randn(1, 5))
    values = [measure(block_traces, gram) for measure in (relative_flatness, neuronwise_flatness, layerwise_flatness)]
    assert_close(torch.stack(values), 3 * gram.flatten().expand(3))
