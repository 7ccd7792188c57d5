"""Largest eigenvalues of layers against the eigenvalues of the dense autograd Hessian."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import hessian_rows
from tests.networks import focal


def net(activation=nn.ReLU, groups=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.BatchNorm2d(4),
        activation(),
        nn.Conv2d(4, 4, 2, groups=groups),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


X = 2 * torch.randn(7, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 2, 1, 0, 1])
PRECISE = {"tolerance": 1e-9, "max_products": 2000}


def dense(model, layer, loss=F.cross_entropy, targets=Y):
    weight = model.get_submodule(layer).weight
    return hessian_rows(model.eval(), (X, targets), layer, range(len(weight)), loss)  # (S, D, S, D)


def check(found, rows, weight):
    size = rows.shape[0] * rows.shape[1]
    largest = torch.linalg.eigvalsh(rows.reshape(size, size))[-1]
    assert_close(found.lambda_max, float(largest), rtol=1e-7, atol=1e-12)
    blocks = torch.stack([rows[s, :, s, :] for s in range(len(rows))])
    of_filters = torch.linalg.eigvalsh(blocks)[:, -1]
    assert_close(found.filter_lambda_max, of_filters, rtol=1e-6, atol=1e-9)
    norms = weight.detach().flatten(1).square().sum(1)
    assert_close(found.layerwise_lambda_max, float(norms.sum() * largest), rtol=1e-7, atol=1e-12)
    assert_close(found.neuronwise_lambda_max, float((norms * of_filters).sum()), rtol=1e-6, atol=1e-9)
    assert found.residual_norm <= 1e-8 * abs(found.lambda_max) + 1e-12


@pytest.mark.parametrize("layer", ["0", "3", "7"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_layer_of_a_relu_network(layer, groups):
    model = net(groups=groups)
    found = lf.measure_lambda_max(model, [(X[:3], Y[:3]), (X[3:], Y[3:])], layers=layer, **PRECISE)[layer]
    assert found.exact
    assert found.num_samples == 7
    check(found, dense(model, layer), model.get_submodule(layer).weight)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Tanh])
def test_curved_activations_under_the_closed_form(activation):
    model = net(activation)
    found = lf.measure_lambda_max(model, [(X, Y)], **PRECISE)["3"]
    assert (found.info.method, found.exact) == ("closed_form", True)
    check(found, dense(model, "3"), model[3].weight)


@pytest.mark.parametrize(
    ("options", "of_torch", "targets"),
    [
        ({"loss": "mse"}, F.mse_loss, torch.randn(7, 3).double()),
        ({"loss": "binary_cross_entropy"}, F.binary_cross_entropy_with_logits, torch.rand(7, 3).round().double()),
        ({"loss": focal}, lambda f, y: focal(f, y).mean(), Y),
        ({"class_weight": [1.0, 2.0, 0.5]}, nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double()), Y),
    ],
    ids=["mse", "binary", "focal", "weighted"],
)
@pytest.mark.parametrize("layer", ["0", "3"])
def test_other_losses(options, of_torch, targets, layer):
    model = net(nn.ReLU)
    found = lf.measure_lambda_max(model, [(X, targets)], layers=layer, **options, **PRECISE)[layer]
    check(found, dense(model, layer, of_torch, targets), model.get_submodule(layer).weight)


def test_a_layer_that_runs_twice():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.head((self.conv(x) + self.conv(x.flip(3)).relu()).mean((2, 3)))

    model = Siamese().double()
    found = lf.measure_lambda_max(model, [(X, Y)], layers="conv", **PRECISE)["conv"]
    assert found.exact
    check(found, dense(model, "conv"), model.conv.weight)


def test_check_can_fail():
    model = net()
    found = lf.measure_lambda_max(model, [(X, Y)], **PRECISE)["3"]
    with pytest.raises(AssertionError):
        check(found, 1.001 * dense(model, "3"), model[3].weight)


def test_lambda_max_is_at_most_the_trace_and_samples_alone_give_the_same():
    model = net()
    found = lf.measure_lambda_max(model, [(X, Y)], layers="all", **PRECISE)
    alone = lf.measure_lambda_max(model, list(zip(X[:, None], Y[:, None], strict=True)), layers="all", **PRECISE)
    report = lf.measure_flatness(model, [(X, Y)], layers="all")
    for name, layer in found.items():
        assert layer.lambda_max <= report.layers[name].hessian_trace
        assert_close(alone[name].lambda_max, layer.lambda_max, rtol=1e-8, atol=0)
        assert alone[name].num_samples == 7


def test_what_is_not_exact_says_so():
    found = lf.measure_lambda_max(net(nn.SiLU), [(X, Y)], layers="0")["0"]
    assert (found.exact, found.info.method) == (False, "gauss_newton")
    with pytest.raises(lf.NotExactError, match="'0'"):
        lf.measure_lambda_max(net(nn.SiLU), [(X, Y)], layers="0", strict=True)


def test_the_loss_is_named():
    found = lf.measure_lambda_max(net(), [(X, Y)], label_smoothing=0.1)
    assert found.loss_name == found.to_dict()["loss_name"] == "cross_entropy(label_smoothing=0.1)"
    assert "Loss: cross_entropy(label_smoothing=0.1)." in " ".join(str(found).split())


@pytest.mark.parametrize("by_filter", [False, True])
def test_eigenvalues_that_have_not_converged_are_not_exact(by_filter):
    rough, found = (
        lf.measure_lambda_max(net(), [(X, Y)], max_products=products, by_filter=by_filter) for products in (1, 100)
    )
    assert (rough["3"].converged, rough.exact, found["3"].converged, found.exact) == (False, False, True, True)
    assert "not converged" in repr(rough["3"])
    assert "Not converged (3)" in str(rough)
    assert "onverged" not in str(found) + repr(found["3"])
    with pytest.raises(lf.NotExactError, match="'3': its largest eigenvalues have not converged.*max_products="):
        lf.measure_lambda_max(net(), [(X, Y)], max_products=1, by_filter=by_filter, strict=True)


def test_filters_can_be_left_out():
    found = lf.measure_lambda_max(net(), [(X, Y)], by_filter=False)["3"]
    assert found.filter_lambda_max is None
    assert math.isnan(found.neuronwise_lambda_max)


def test_too_much_memory_is_refused():
    with pytest.raises(lf.BatchError, match=r"'0'.*GB.*max_gigabytes="):
        lf.measure_lambda_max(net(), [(X, Y)], layers="0", max_gigabytes=1e-6)
    with pytest.raises(lf.BatchError, match="max_gigabytes=1e-06"):
        lf.measure_lambda_max(net(), [(X, Y)], max_gigabytes=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tolerance": "a"}, "tolerance='a' must be a positive number"),
        ({"tolerance": -1.0}, "^tolerance=-1.0 must be a positive number"),
        ({"max_gigabytes": "2"}, "max_gigabytes='2' must be a positive number"),
        ({"max_products": 0}, "max_products=0 must be a whole number, 1 at least"),
        ({"max_products": 1.5}, "max_products=1.5 must be a whole number, 1 at least"),
        ({"max_products": True}, "max_products=True must be a whole number, 1 at least"),
    ],
    ids=str,
)
def test_options_are_checked(option, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.measure_lambda_max(net(), [(X, Y)], **option)


def test_no_batches():
    with pytest.raises(lf.BatchError, match="No sample"):
        lf.measure_lambda_max(net(), [])


def test_it_leaves_no_trace():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = lf.measure_lambda_max(model, [(X, Y)])["3"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first.lambda_max == lf.measure_lambda_max(model, [(X, Y)])["3"].lambda_max
