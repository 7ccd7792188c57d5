"""The layer that a kernel belongs to, if it is put together from parameters or kept in a list."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.layers.own_layers import Bank, Listed, LowRank, Own, Standardised, Together, X, Y, network


@pytest.mark.parametrize("layers", ["last", "2", "all"])
def test_a_convolution_of_ones_own_is_measured(layers):
    net = network(Own(4, 5))
    layer = lf.measure_flatness(net, [(X, Y)], layers=layers).layers["2"]
    assert (layer.exact, layer.info.kernel, layer.info.kind) == (True, "parameter", "Own")
    assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), "2"), rtol=1e-9, atol=1e-12)


def test_a_kernel_in_a_list_is_that_of_the_module_with_the_list():
    net = network(Listed(4, 5))
    layer = lf.measure_flatness(net, [(X, Y)], layers="all").layers["2"]
    assert (layer.exact, layer.info.kernel) == (True, "effective")
    same = network(nn.Conv2d(4, 5, 3, bias=False))
    same[0], same[6], same[2].weight = net[0], net[6], net[2].kernels[0]
    assert_close(layer.block_traces[0], oracle_block_traces(same, (X, Y), "2"), rtol=1e-9, atol=1e-12)
    assert list(lf.measure_flatness(network(Listed(4, 5, scale=2)), [(X, Y)], layers="all").left_out) == ["2"]


@pytest.mark.parametrize("kind", [Standardised, LowRank, Together, Bank])
def test_a_computed_kernel_is_that_of_its_module(kind):
    net = network(kind(4, 5))
    report = lf.measure_flatness(net, [(X, Y)])
    assert report.layers["2"].info.kernel == "effective"
    same = network(nn.Conv2d(4, 5, 3))
    same[0], same[6] = net[0], net[6]
    with torch.no_grad():
        kernel = net[2](torch.eye(36).double().view(36, 4, 3, 3)) - net[2](torch.zeros(1, 4, 3, 3).double())
        same[2].weight.copy_(kernel.flatten(1).T.reshape(5, 4, 3, 3))
        same[2].bias.copy_(net[2](torch.zeros(1, 4, 3, 3).double()).flatten())
    assert_close(report.hessian_trace, lf.measure_flatness(same, [(X, Y)]).hessian_trace, rtol=1e-9, atol=0)
