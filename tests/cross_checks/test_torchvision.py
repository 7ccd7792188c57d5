"""Networks that people train: the last convolution of torchvision's models against Jacobians and the oracle."""

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle
from tests.torchvision_models import CURVED, PIECEWISE_LINEAR, random_model

pytest.importorskip("torchvision")


def block_traces_from_jacobians(model, x, layer):
    """``T = E sum_c J_c J_cᵀ`` with ``J_c[s, d] = sum_k B[k, c] d logit_k / d w_s[d]`` and ``Λ = B Bᵀ``.

    One backward for every sample and class. The whole Hessian where logits are piecewise linear in the weight.
    """
    weight = model.get_submodule(layer).weight
    fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for sample in x.split(1):
        kernel = weight.detach().clone().requires_grad_()
        (logits,) = functional_call(model, {**fixed, f"{layer}.weight": kernel}, (sample,))
        pi = logits.detach().softmax(0)
        root = torch.diag(pi.sqrt()) - torch.outer(pi, pi.sqrt())
        assert_close(root @ root.T, torch.diag(pi) - torch.outer(pi, pi), rtol=0, atol=1e-14)
        for column in root.T:
            (gradient,) = torch.autograd.grad(logits, kernel, column, retain_graph=True)
            total.addmm_(gradient.flatten(1), gradient.flatten(1).T)
    return total / len(x)


def measure_last(model, batch):
    (item,) = lf.measure_flatness(model, [batch]).layers.items()
    return item


def assert_traces_close(actual, expected, rtol):
    expected = expected.to(actual)
    groups, per_group, _ = actual.shape
    for g in range(groups):
        inside = slice(g * per_group, (g + 1) * per_group)
        assert_close(actual[g], expected[inside, inside], rtol=0, atol=rtol * float(expected.abs().max()))


def assert_float32_is_close(model, batch):
    _, expected = measure_last(model, batch)
    _, layer = measure_last(model.float(), (batch[0].float(), batch[1]))
    assert_traces_close(layer.block_traces, torch.block_diag(*expected.block_traces), rtol=1e-4)
    assert layer.hessian_trace == pytest.approx(expected.hessian_trace, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PIECEWISE_LINEAR)
def test_last_convolution_of_a_piecewise_linear_network(architecture):
    model, batch = random_model(architecture)
    name, layer = measure_last(model, batch)
    assert layer.exact
    assert layer.info.kernel == "parameter"
    expected = block_traces_from_jacobians(model, batch[0], name)
    assert expected.abs().max() > 1e-8
    assert_traces_close(layer.block_traces, expected, rtol=1e-10)
    assert_float32_is_close(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CURVED)
def test_last_convolution_of_a_curved_network(architecture):
    model, batch = random_model(architecture)
    name, layer = measure_last(model, batch)
    assert layer.exact
    assert layer.block_traces[0, [0, 777]].abs().max() > 1e-8
    assert_matches_oracle(model, batch, name, filters=[0, 777])
    # The residual term is what a Gauss-Newton matrix would leave out; it must not be negligible here.
    rest = layer.block_traces[0] - block_traces_from_jacobians(model, batch[0], name)
    assert rest.abs().max() > 1e-3 * layer.block_traces.abs().max()
    assert_float32_is_close(model, batch)


@pytest.mark.slow
def test_jacobians_can_disagree():
    model, batch = random_model("squeezenet1_1")
    name, layer = measure_last(model, batch)
    expected = block_traces_from_jacobians(model, batch[0], name)
    with pytest.raises(AssertionError):
        assert_traces_close((1 + 1e-8) * layer.block_traces, expected, rtol=1e-10)
