"""A loss that does not fit what the model returns, or the targets, is questioned by one warning."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from tests.networks import focal
from tests.refused import Net, X, Y

SOFT = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).softmax(1)
SEVERAL = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).float()
SPECTRUM = {"top_k": 1, "num_steps": 2, "num_probes": 1}
FUNCTIONS = {
    "flatness": lf.measure_flatness,
    "eigenvalues": lf.measure_lambda_max,
    "spectrum": lambda *arguments, **options: lf.hessian_spectrum(*arguments, **SPECTRUM, **options),
    "landscape": lambda *arguments, **options: lf.loss_landscape(*arguments, steps=3, axes=["random"], **options),
}


def warnings_of(function, output, targets, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        FUNCTIONS[function](Net(output), [(X, targets), (X, targets)], **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_probabilities_under_cross_entropy(function):
    (text,) = warnings_of(function, lambda f: f.softmax(1), Y)
    assert "returns probabilities" in text
    assert "applies a softmax itself" in text


@pytest.mark.parametrize("function", FUNCTIONS)
def test_several_labels_under_cross_entropy(function):
    (text,) = warnings_of(function, None, SEVERAL)
    assert "do not sum to one" in text
    assert "binary_cross_entropy" in text


@pytest.mark.parametrize("function", ["flatness", "eigenvalues", "spectrum"])
@pytest.mark.parametrize("output", [torch.sigmoid, lambda f: f[:, None].sigmoid().squeeze(1)], ids=["plain", "shaped"])
def test_probabilities_under_binary_cross_entropy(function, output):
    (text,) = warnings_of(function, output, SEVERAL, loss="binary_cross_entropy")
    assert "ends with a sigmoid" in text


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("output", "targets", "loss"),
    [
        (None, Y, "cross_entropy"),
        (None, SOFT, "cross_entropy"),
        (None, F.one_hot(Y, 4).half(), "cross_entropy"),
        (lambda f: F.log_softmax(f, 1), Y, "cross_entropy"),
        (lambda f: F.log_softmax(f, 1), Y, nn.NLLLoss()),
        (lambda f: f.abs() / 10, Y, "cross_entropy"),
        (None, SEVERAL, "binary_cross_entropy"),
        (lambda f: 0.5 + f / 100, SEVERAL, "binary_cross_entropy"),
        (lambda f: f.softmax(1), SOFT, "mse"),
        (lambda f: f.softmax(1), Y, focal),
    ],
    ids=["indices", "soft", "half", "log", "nll", "positive", "labels", "between 0 and 1", "brier", "own"],
)
def test_losses_that_fit_are_not_questioned(function, output, targets, loss):
    assert not warnings_of(function, output, targets, loss=loss)
