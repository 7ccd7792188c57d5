"""What a model may return, and what is said of outputs without logits."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
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


def test_a_single_logit_has_a_remedy():
    refused(lf.BatchError, r"shape \(5,\).*logits.unsqueeze\(1\).*argmax", Net(lambda f: f[:, 0]))


@pytest.mark.parametrize("output", [lambda f: f.argmax(1), lambda f: (f > 0).long(), lambda f: f > 0])
def test_logits_that_are_no_floating_point_numbers(output):
    refused(lf.BatchError, "logits are numbers of type torch.* no derivative.*before argmax", Net(output))


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


def with_value(name, value):
    net = Net(tail=nn.BatchNorm2d(6))
    net.register_buffer("mask", torch.full((3,), -torch.inf))  # which is no fault
    dict([*net.named_parameters(), *net.named_buffers()])[name].data.view(-1)[1] = value
    return net


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("conv.weight", torch.nan, "the parameter 'conv.weight': training has diverged"),
        ("head.bias", torch.inf, "the parameter 'head.bias': training has diverged"),
        ("tail.running_var", torch.nan, "the buffer 'tail.running_var': training has diverged"),
        ("tail.running_mean", torch.inf, "the buffer 'tail.running_mean': training has diverged"),
    ],
)
@guards("model.logits:what_is_not_finite", returns="")
def test_what_makes_logits_not_finite_is_named(name, value, says):
    refused(lf.BatchError, f"logits contain NaN or infinity, and so does {says}", with_value(name, value))
    with pytest.raises(lf.BatchError, match=f"^The logits contain NaN or infinity, and so does {says}"):
        lf.hessian_spectrum(with_value(name, value), [(X, Y)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_named(value):
    inputs = X.clone()
    inputs[3, 0, 0, 0] = value
    refused(lf.BatchError, "NaN or infinity, and so do the inputs. Clean the data", batches=[(inputs, Y)])
    with pytest.raises(lf.BatchError, match="'1': .* and so do the inputs"):
        lf.compare([Net(), Net()], [(X, Y)], train_batches=[(inputs, Y)])


def test_the_forward_is_named_where_all_else_is_finite():
    refused(lf.BatchError, "but inputs, parameters and buffers do not: activations overflow", Net(lambda f: f / 0))


def test_logits_that_are_not_finite_in_a_later_batch():
    refused(lf.BatchError, "logits contain NaN or infinity", batches=[(X, Y), (X * torch.nan, Y)])
