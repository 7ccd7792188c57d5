"""What a model may return, and what is said of outputs without logits."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.refused import Net, X, Y, measure, refused


@pytest.mark.parametrize(
    "output",
    [lambda f: f[:, :, None].expand(-1, -1, 3), lambda f: f[:, :, None, None].expand(-1, -1, 6, 6)],
    ids=["3-D", "4-D"],
)
def test_dense_prediction(output):
    refused(lf.BatchError, r"logits have shape \(5, 4, .*must be \(samples, classes\).*Dense prediction", Net(output))


def test_logits_without_classes():
    refused(lf.BatchError, r"logits have shape \(5,\); they must be \(samples, classes\)", Net(lambda f: f[:, 0]))


def test_one_column_of_logits():
    refused(lf.BatchError, "one column.*For two classes, train with two logits", Net(classes=1))


@pytest.mark.parametrize(
    ("output", "described", "returned"),
    [
        (lambda f: (f, f), r"tuple of 0: \(5, 4\), 1: \(5, 4\)", r"self.model\(\*inputs\)\[0\]`. Measure one output"),
        (lambda f: [f], r"list of 0: \(5, 4\)", r"self.model\(\*inputs\)\[0\]`.$"),
        (
            lambda f: (f[:, :, None], f, 3),
            r"tuple of 0: \(5, 4, 1\), 1: \(5, 4\), 2: int",
            r"self.model\(\*inputs\)\[1\]",
        ),
        (lambda f: {"out": f}, r"dict of 'out': \(5, 4\)", r"self.model\(\*inputs\)\['out'\]"),
        (lambda f: {"logits": None}, "dict of 'logits': NoneType", "return logits"),
        (lambda f: None, "NoneType", "return logits"),
        (lambda f: f.detach().numpy(), "ndarray", "return logits"),
    ],
)
def test_output_without_logits(output, described, returned):
    refused(lf.BatchError, f"returns a {described}; flatness needs the logits.*Wrap the model.*{returned}", Net(output))


def test_the_remedy_for_several_outputs_works():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net(lambda f: (f, f.square()))

        def forward(self, *inputs):
            return self.model(*inputs)[0]

    actual, expected = measure(Logits()).layers["model.conv"], measure().layers["conv"]
    assert_close(actual.block_traces, expected.block_traces, rtol=0, atol=0)


@pytest.mark.parametrize(
    "output",
    [
        lambda f: {"logits": f, "loss": f.sum()},
        lambda f: SimpleNamespace(logits=f),
        lambda f: namedtuple("Output", "loss logits")(f.sum(), f),
    ],
    ids=["dict", "attribute", "named tuple"],
)
def test_output_with_logits_is_measured(output):
    actual, expected = measure(Net(output)).layers["conv"], measure().layers["conv"]
    assert_close(actual.block_traces, expected.block_traces, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(value):
    refused(lf.BatchError, "logits contain NaN or infinity", Net(lambda f: torch.where(f == f.max(), value, f)))


def test_logits_that_are_not_finite_in_a_later_batch():
    refused(lf.BatchError, "logits contain NaN or infinity", batches=[(X, Y), (X * torch.nan, Y)])
