"""The claim of the package: the numbers are those of the autograd Hessian."""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional.closed_form import closed_form_contraction
from lightning_flatness.testing import assert_matches_oracle, hessian_rows, oracle_block_traces
from tests.guarding import guards
from tests.networks import CURVED, PIECEWISE_LINEAR, Network, recipes


@guards("layers/recording.py", "return node.clone()", "return node")
@given(recipe=recipes())
@settings(max_examples=80)
def test_random_networks_match_the_autograd_hessian(recipe):
    network = Network(recipe)
    assert_matches_oracle(network, network.batch(), "conv", rtol=1e-10)


@pytest.mark.slow
@given(recipe=recipes())
@settings(max_examples=300)
def test_many_more_random_networks_match_the_autograd_hessian(recipe):
    network = Network(recipe)
    assert_matches_oracle(network, network.batch(), "conv", rtol=1e-10)


@given(recipe=recipes())
@settings(max_examples=40)
def test_float32_is_within_1e_4_of_float64(recipe):
    network = Network(recipe)
    x, y = network.batch()
    double = lf.measure_flatness(copy.deepcopy(network).double(), [(x, y)], layers="conv")
    single = lf.measure_flatness(network, [(x.float(), y)], layers="conv")
    expected = double.layers["conv"].block_traces
    assert_close(single.layers["conv"].block_traces, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    # Terms of both signs cancel in relative flatness, so its error is measured against their absolute sum.
    rows = network.conv.weight.detach().double().unflatten(0, (recipe.groups, -1)).flatten(2)
    size = float(((rows @ rows.mT).abs() * expected.abs()).sum())
    assert abs(single.relative_flatness - double.relative_flatness) <= 1e-4 * size


@given(recipe=recipes(activations=PIECEWISE_LINEAR))
@settings(max_examples=30)
def test_piecewise_linear_networks_need_no_labels(recipe):
    network = Network(recipe).double()
    x, y = network.batch()
    with_labels = lf.measure_flatness(network, [(x, y)], layers="conv").layers["conv"]
    without = lf.measure_flatness(network, [x], layers="conv").layers["conv"]
    assert_close(without.block_traces, with_labels.block_traces, rtol=1e-12, atol=1e-15)


@given(recipe=recipes(activations=CURVED))
@settings(max_examples=30)
def test_curved_networks_need_labels(recipe):
    network = Network(recipe).double()
    with pytest.raises(lf.BatchError, match="'conv'.*curved"):
        lf.measure_flatness(network, [network.batch()[0]], layers="conv")


def test_oracle_is_the_textbook_hessian():
    # A channel for the oracle itself: torch's own dense Hessian of the loss as a function of the kernel.
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    x, y = torch.randn(3, 1, 4, 4).double(), torch.tensor([0, 2, 1])

    def loss(kernel):
        return nn.functional.cross_entropy(torch.func.functional_call(net, {"0.weight": kernel}, (x,)), y)

    dense = torch.autograd.functional.hessian(loss, net[0].weight.detach()).reshape(2, 4, 2, 4)
    assert_close(hessian_rows(net, (x, y), "0", [0, 1]), dense, rtol=1e-12, atol=1e-14)
    assert_close(oracle_block_traces(net, (x, y), "0"), torch.einsum("sdtd->st", dense), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [1 + 1e-8, 1 - 1e-8])
def test_oracle_assertion_can_fail(monkeypatch, factor):
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
    batch = torch.randn(4, 1, 8), torch.tensor([0, 1, 2, 0])
    assert_matches_oracle(net, batch, "0")

    def scaled(*arguments):
        contraction = closed_form_contraction(*arguments)
        return contraction._replace(total=factor * contraction.total)

    monkeypatch.setattr("lightning_flatness.layers.closed_form.closed_form_contraction", scaled)
    with pytest.raises(AssertionError):
        assert_matches_oracle(net, batch, "0")
    with pytest.raises(AssertionError):
        assert_matches_oracle(net, batch, "0", filters=[1])


def test_a_model_that_is_one_layer_has_no_name():
    assert_matches_oracle(nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), "")


def test_oracle_refuses_a_kernel_it_cannot_differentiate():
    class Standardised(nn.Conv1d):
        def forward(self, x):
            return nn.functional.conv1d(x, self.weight - self.weight.mean((1, 2), keepdim=True))

    net = nn.Sequential(Standardised(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(AssertionError, match="applies a kernel other than"):
        assert_matches_oracle(net, (torch.randn(4, 1, 8), torch.tensor([0, 1, 2, 0])), "0")
