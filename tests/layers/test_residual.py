"""What Gauss-Newton leaves out of the Hessian, estimated by random probes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards
from tests.networks import two_convolutions


def net():
    return two_convolutions((2, 3, 4), (2, 2), 3, nn.Tanh).double()


X = 2 * torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 2, 1, 0])
BATCH = [(X, Y)]


def measure(model=None, layers="0", **options):
    return lf.measure_flatness(model or net(), BATCH, layers=layers, residual="hutchinson", **options)


def assert_estimated(model, name):
    """Within four standard errors."""
    layer = measure(model, name, num_probes=400).layers[name]
    expected = float(oracle_block_traces(model, (X, Y), name).trace())
    assert layer.method == "gauss_newton+hutchinson"
    assert abs(layer.hessian_trace - expected) < 4 * layer.standard_errors["hessian_trace"]


def test_it_is_the_hessian_within_its_standard_error():
    report = measure(layers="all", num_probes=400)
    assert [layer.method for layer in report.layers.values()] == [
        "gauss_newton+hutchinson",
        "closed_form",
        "gauss_newton",
    ]
    assert [layer.exact for layer in report.layers.values()] == [False, True, True]
    layer = report.layers["0"]
    expected = oracle_block_traces(net(), (X, Y), "0")
    gauss_newton = lf.measure_flatness(net(), BATCH, layers="0").layers["0"]
    part = float(expected.trace()) - gauss_newton.hessian_trace
    error = layer.standard_errors["hessian_trace"]
    assert abs(part) > 5 * error, "the residual is too small here for this test to tell"
    assert abs(layer.hessian_trace - float(expected.trace())) < 4 * error
    rows = net()[0].weight.detach().flatten(1)
    kappa = float((rows @ rows.T * expected).sum())
    assert abs(layer.relative_flatness - kappa) < 4 * layer.standard_errors["relative_flatness"]
    assert_close(layer.block_traces[0], layer.block_traces[0].T, rtol=0, atol=1e-12)
    entries = (layer.block_traces[0] - expected).abs().max() / expected.abs().max()
    assert 0 < float(entries) < 0.2


@pytest.mark.slow
def test_standard_errors_are_those_of_repetitions():
    expected = float(oracle_block_traces(net(), (X, Y), "0").trace())
    repeated = [measure(seed=seed, num_probes=30) for seed in range(40)]
    scores = torch.tensor([(r.hessian_trace - expected) / r.standard_errors["hessian_trace"] for r in repeated])
    assert abs(float(scores.mean())) < 0.6
    assert 0.6 < float(scores.square().mean().sqrt()) < 1.6


def test_a_kernel_that_runs_on_its_own_output():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

        def forward(self, x):
            return self.head(self.conv(self.conv(x).relu()).mean((2, 3)))

    torch.manual_seed(0)
    assert_estimated(Recurrent().double(), "conv")


def test_probes_are_repeatable_and_leave_the_generators_alone():
    model, state = net(), torch.get_rng_state()
    first, again, other = measure(model), measure(model), measure(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.hessian_trace == again.hessian_trace != other.hessian_trace


def test_exact_layers_need_none():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    report = measure(model, "all")
    assert report.exact
    assert set(report.standard_errors.values()) == {0.0}


def test_without_targets_there_is_an_error():
    with pytest.raises(lf.BatchError, match="residual='hutchinson' needs targets"):
        lf.measure_flatness(net(), [X], layers="0", residual="hutchinson")


@pytest.mark.parametrize("what", ["no second derivative", "computed kernel"])
def test_where_it_cannot_be_had_the_label_says_so(what):
    if what == "computed kernel":
        model = net()
        nn.utils.parametrizations.weight_norm(model[0])
    else:
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Hardsigmoid(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 3))
    layer = measure(model.double()).layers["0"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)
    assert layer.info.reason


def test_report_says_what_is_estimated():
    text = " ".join(str(measure(layers="all")).split())
    assert "±" in text
    assert (
        "the Gauss-Newton part plus an estimate of the rest of the Hessian, since the network is curved after it"
        in text
    )


@guards("model/isolation.py", "sdpa_kernel(SDPBackend.MATH)", "ExitStack()")
def test_attention_has_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(5, 15), nn.Linear(5, 3)

        def forward(self, x):
            q, k, v = self.qkv(x[:, 0]).chunk(3, dim=-1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))

    torch.manual_seed(0)
    assert_estimated(Attention().double(), "qkv")


def test_a_sample_alone_has_the_error_of_the_same_sample_twice():
    twice = X[:1].repeat(2, 1, 1, 1), Y[:1].repeat(2)
    alone = lf.measure_flatness(net(), [(X[:1], Y[:1])], layers="0", residual="hutchinson")
    together = lf.measure_flatness(net(), [twice], layers="0", residual="hutchinson")
    assert_close(alone.hessian_trace, together.hessian_trace, rtol=1e-10, atol=0)
    assert_close(alone.standard_errors, together.standard_errors, rtol=1e-10, atol=0)
