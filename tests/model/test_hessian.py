"""Products of the Hessian with vectors, against the dense Hessian."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional import find_loss
from lightning_flatness.model.hessian import LossCurvature
from tests.spectra import NETS, convolutional, dense_gauss_newton, dense_hessian, perceptron, quick, split


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("net", ["convolutions and norm", "perceptron"])
def test_products_are_those_of_the_dense_matrix(net, matrix):
    model, x, y = NETS[net]()
    dense = (dense_hessian if matrix == "hessian" else dense_gauss_newton)(model, x, y)
    curvature = LossCurvature(model, find_loss("cross_entropy"), None, matrix)
    for _ in range(3):
        vector = torch.randn(curvature.size, dtype=torch.float64)
        actual = curvature.sums(split(x, y, 5, len(x) - 5), vector)
        assert_close(actual.product / len(x), dense @ vector, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("loss", "function"), [("mse", mse_loss), ("cross_entropy", cross_entropy)])
def test_losses(loss, function):
    model, x, y = perceptron()
    y = nn.functional.one_hot(y, 4).double()
    dense = dense_hessian(model, x, y, function)
    result = quick(model, [(x, y)], loss=loss, top_k=3)
    assert_close(result.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-8, atol=0)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_weighted_mean_over_batches_of_a_weighted_loss(matrix):
    model, x, y = perceptron()
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    y[3:6] = -100

    def loss(f, targets):
        return cross_entropy(f, targets, weight, label_smoothing=0.1)

    result = quick(model, split(x, y, 7, 3, 20), class_weight=weight, label_smoothing=0.1, top_k=3, matrix=matrix)
    if matrix == "hessian":
        dense = dense_hessian(model, x, y, loss)
        assert_close(result.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-8, atol=0)
    whole = quick(model, [(x, y)], class_weight=weight, label_smoothing=0.1, top_k=3, matrix=matrix)
    assert_close(result.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=0)
    assert result.num_samples == 27


def test_frozen_parameters_are_left_out_and_unused_ones_are_zeros():
    model, x, y = convolutional()
    model.conv1.requires_grad_(False)
    model.unused = nn.Linear(3, 1).double()
    result = quick(model, [(x, y)], top_k=3)
    assert "conv1.weight" not in result.parameters
    assert float(result.eigenvector(0)["unused.weight"].norm()) < 1e-6
    exact = torch.linalg.eigvalsh(dense_hessian(model, x, y, names=list(result.parameters)[:-2])).flip(0)
    assert_close(result.eigenvalues, exact[:3], rtol=1e-8, atol=0)


def test_tied_weights_count_once():
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    net = nn.Sequential(first, nn.Tanh(), first, nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    result = quick(net, [(x, y)], top_k=3)
    assert list(result.parameters) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert list(quick(net, [(x, y)], params="2").parameters) == ["0.weight", "0.bias"]
    assert_close(result.eigenvalues, torch.linalg.eigvalsh(dense_hessian(net, x, y)).flip(0)[:3], rtol=1e-8, atol=0)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    batches = [(torch.randint(9, (6, 3)), torch.randint(3, (6,)))]
    actual, expected = (lf.hessian_spectrum(net, batches, top_k=3, num_steps=4, num_probes=2) for net in (model, dense))
    assert_close(actual.eigenvalues, expected.eigenvalues)
