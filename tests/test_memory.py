"""Diagonals alone, parts of a batch, and what happens when memory runs out."""

from collections import deque

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.capture import passes
from lightning_flatness.metrics import Measurement

MEASURES = ("hessian_trace", "neuronwise_flatness", "layerwise_flatness")


def net(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        activation(),
        nn.Conv2d(4, 6, 2, groups=2),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()


X, Y = torch.randn(9, 2, 8, 8).double(), torch.randint(3, (9,))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("options", [{}, {"residual": "hutchinson"}, {"loss": "mse"}], ids=str)
def test_diagonals_alone_give_the_same_measures(activation, options):
    targets = torch.randn(9, 3).double() if options.get("loss") == "mse" else Y
    whole = lf.measure_flatness(net(activation), [(X, targets)], layers="all", **options)
    part = lf.measure_flatness(net(activation), [(X, targets)], layers="all", measures=MEASURES, **options)
    for name, layer in part.layers.items():
        expected = whole.layers[name]
        assert_close(layer.block_traces, expected.block_traces.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-15)
        assert_close(layer.filter_traces, expected.filter_traces, rtol=1e-12, atol=1e-15)
        for measure in (*MEASURES, "weight_norm"):
            assert_close(getattr(layer, measure), getattr(expected, measure), rtol=1e-12, atol=0)
        assert layer.relative_flatness != layer.relative_flatness  # NaN
        assert "relative_flatness" not in layer.standard_errors
        assert layer.info.memory < expected.info.memory or layer.info.num_filters == layer.info.groups
    assert "nan" not in str(part)


def test_memory_is_what_is_kept():
    measurement = Measurement(net(), layers="all")
    measurement.update(X, Y)
    memory = {name: info.memory for name, info in measurement.layers.items()}
    assert memory == {"0": 3 * 8 * 16, "2": 3 * 8 * 2 * 9, "6": 3 * 8 * 9}
    assert {info.backward_passes for info in measurement.layers.values()} == {0, 2}
    # By patch sums, the cheaper way: P = 36 positions, D = 18, S = 4, two columns.
    assert measurement.layers["0"].multiplications == 2 * 4 * 18 * (36 + 4)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_some_samples_at_a_time_give_the_same(monkeypatch, rows, activation):
    whole = lf.measure_flatness(net(activation), [(X, Y)], layers="all")
    monkeypatch.setattr(passes, "rows_at_a_time", lambda *args: rows)
    parts = lf.measure_flatness(net(activation), [(X, Y)], layers="all")
    for name, layer in parts.layers.items():
        assert layer.num_samples == 9
        assert layer.exact == whole.layers[name].exact
        assert_close(layer.block_traces, whole.layers[name].block_traces, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_forward_pass_takes_as_many_samples_as_fit(monkeypatch, layers):
    whole = lf.measure_flatness(net(), [(X, Y)], layers=layers)
    monkeypatch.setitem(passes.FORWARD_ELEMENTS, "cpu", 3 * 6 * 5 * 5)  # of the second convolution
    model, seen = net(), deque()
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    parts = lf.measure_flatness(model, [(X, Y)], layers=layers)
    assert max(list(seen)[1:]) == 3, "after what runs was traced on four samples"
    for name, layer in parts.layers.items():
        assert layer.num_samples == 9
        assert_close(layer.block_traces, whole.layers[name].block_traces, rtol=1e-12, atol=1e-15)


def test_a_model_for_so_many_samples_gets_so_many(monkeypatch):
    monkeypatch.setitem(passes.FORWARD_ELEMENTS, "cpu", 1)
    model = nn.Sequential(nn.Unflatten(0, (9, 1)), nn.Flatten(0, 1), *net())
    found = lf.measure_flatness(model, [(X, Y)], layers="all")
    for name, layer in lf.measure_flatness(net(), [(X, Y)], layers="all").layers.items():
        assert_close(found.layers[str(int(name) + 2)].block_traces, layer.block_traces, rtol=1e-12, atol=1e-15)


class Tight(nn.Module):
    """Runs out of memory with more than so many samples."""

    def __init__(self, error, most=5):
        super().__init__()
        self.net, self.error, self.most = net(), error, most
        self.calls = deque()  # lists are put back as they were

    def forward(self, x):
        self.calls.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.net(x)


ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_when_memory_runs_out_halves_are_measured(name):
    tight = Tight(ERRORS[name])
    found = lf.measure_flatness(tight, [(X, Y), (X, Y)], layers="all")
    expected = lf.measure_flatness(net(), [(X, Y)], layers="all")
    for layer, info in expected.layers.items():
        assert_close(found.layers[f"net.{layer}"].block_traces, info.block_traces, rtol=1e-12, atol=1e-15)
    assert tight.calls.count(9) == 1, "caught once"
    assert found.num_samples == 18


def test_memory_that_runs_out_again_is_an_error():
    with pytest.raises(lf.BatchError, match="Out of memory while measuring 3 samples.*layers=.*measures="):
        lf.measure_flatness(Tight(ERRORS["GPU"], most=2), [(X, Y)])
    with pytest.raises(lf.BatchError, match="1 samples at a time.*smaller|Out of memory"):
        lf.measure_flatness(Tight(ERRORS["GPU"], most=0), [(X[:1], Y[:1])])


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="something else"):
        lf.measure_flatness(Tight(RuntimeError("something else")), [(X, Y)])


@pytest.mark.parametrize("inputs", [lambda x: {"x": x}, lambda x: [x], lambda x: (x,)], ids=["dict", "list", "tuple"])
def test_halves_of_other_inputs(inputs):
    found = lf.measure_flatness(Tight(ERRORS["GPU"]), [(inputs(X), Y)], layers="net.2")
    expected = lf.measure_flatness(net(), [(X, Y)], layers="2")
    assert_close(found.relative_flatness, expected.relative_flatness, rtol=1e-12, atol=0)
