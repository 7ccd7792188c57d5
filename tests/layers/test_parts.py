"""Diagonals alone, parts of a batch, and what happens when memory runs out."""

import gc
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional.gauss_newton import gauss_newton_contraction
from lightning_flatness.layers import gauss_newton, passes
from lightning_flatness.measure.measurement import Measurement
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.networks import two_convolutions

MEASURES = ("hessian_trace", "neuronwise_flatness", "layerwise_flatness")


def net(activation=nn.ReLU):
    return two_convolutions((2, 4, 6), (3, 2), 3, activation, groups=2).double()


SEED = torch.Generator().manual_seed(0)
X = torch.randn(9, 2, 8, 8, generator=SEED, dtype=torch.float64)
Y = torch.randint(3, (9,), generator=SEED)


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


def float64_tensors():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance() asks deprecated module attributes, too
        return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype == torch.float64]


@guards("functional/symmetric.py", "row : row + size, row:].flatten(1)", "row : row + size].flatten(1)")
def test_between_batches_there_are_halves_of_symmetric_matrices():
    filters = 256
    layers = (nn.Conv2d(2, filters, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 3))
    measurement = Measurement(nn.Sequential(*layers))
    before = float64_tensors()
    measurement.update(X.float(), Y)
    measurement.take_spread()
    measurement.measure_held()
    added = {id(tensor): tensor.numel() / filters**2 for tensor in float64_tensors()}
    for tensor in before:
        added.pop(id(tensor), None)
    assert sorted(size for size in added.values() if size > 0.25) == [0.53125, 0.53125]  # and the filters' Gram matrix
    assert measurement.report().layers["0"].block_traces.shape == (1, filters, filters)


def test_columns_are_taken_some_at_a_time(monkeypatch):
    taken = []

    def counted(calls, cotangents, *options):
        taken.append(len(cotangents[0]))
        return gauss_newton_contraction(calls, cotangents, *options)

    monkeypatch.setattr(gauss_newton, "gauss_newton_contraction", counted)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.Tanh(), nn.Linear(3, 30)).double()
    lf.measure_flatness(model, [(X, torch.arange(9))], layers=["1"])
    assert max(taken) == gauss_newton.MOST_COLUMNS["cpu"]
    assert sum(taken) in (29, 30)


def test_memory_is_what_is_kept():
    measurement = Measurement(net(), layers="all")
    measurement.certify(X, Y, live=False)
    memory = {name: info.memory for name, info in measurement.layers.items()}
    assert memory == {"0": 5 * 8 * 16, "2": 5 * 8 * 2 * 9, "6": 5 * 8 * 9}
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


class AddsAVector(nn.Module):
    """A layer of it runs on a vector, which has no batch dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.of_vector, self.last = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.last((self.first(x) + self.of_vector(self.vector)).relu())


@guards(
    "layers/waiting.py",
    "return cls.of_calls(certified.calls,",
    "return cls.of_calls(certified.recorded.calls,",
    ids="9",
)
@pytest.mark.parametrize("rows", [9, 3])
def test_samples_wait_without_the_layers_that_are_left_out(monkeypatch, rows):
    monkeypatch.setattr(passes, "rows_at_a_time", lambda *args: rows)
    report = lf.measure_flatness(AddsAVector(), [(torch.randn(9, 6), Y)], layers="all")
    assert list(report.layers) == ["first", "last"]
    assert not math.isnan(report.layers["first"].normalized_relative_flatness)


class ByEinsum(nn.Linear):
    """A linear layer that applies its weight in a way that no convolution is seen."""

    def forward(self, x):
        return torch.einsum("nd,sd->ns", x, self.weight)


def test_a_linear_layer_without_a_linear_map_is_left_out():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), ByEinsum(5, 5), nn.ReLU(), nn.Linear(5, 3))
    report = lf.measure_flatness(net, [(torch.randn(9, 6), Y)], layers="all")
    assert list(report.layers) == ["0", "4"]
    assert "runs 0 convolutions or linear maps" in report.left_out["2"]


class Pooled(nn.Module):
    """Does something to the pooled features, that other samples or random numbers may have a part in."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = net(), change

    def forward(self, x):
        return self.net[-1](self.change(self.net[:-1](x)))


@guards("layers/passes.py", "if first and not is_new:", "if False:")
@guards("layers/passes.py", "self._certify_same(part, recorded.logits)", "pass", ids="place in the batch-2")
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda g: g + torch.rand_like(g),
        lambda g: g + torch.rand(6),
        lambda g: torch.cat([g[:4], g[4:] * torch.rand(())]),
        lambda g: nn.functional.dropout(g, 0.5),
        lambda g: g / g.detach().abs().amax(),
        lambda g: g * 8 / len(g),
        lambda g: g * torch.arange(1, 1 + len(g))[:, None],
    ],
    ids=["noise", "shared noise", "noise in some", "dropout", "largest", "size of the batch", "place in the batch"],
)
def test_what_is_random_or_of_the_batch_is_refused_in_parts(monkeypatch, rows, change):
    monkeypatch.setattr(passes, "rows_at_a_time", lambda *args: rows)
    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(lf.LayerSelectionError, match="Two forward passes on the same samples"):
            lf.measure_flatness(Pooled(change), [(X, Y)], layers="all")


def test_fewer_logits_than_samples_are_refused_in_parts(monkeypatch):
    monkeypatch.setattr(passes, "rows_at_a_time", lambda *args: 2)
    for targets in (Y, None):
        with pytest.raises(lf.BatchError, match="logits"):
            lf.measure_flatness(Pooled(lambda g: g[:2]), [(X, targets)], layers="all")


class Tight(nn.Module):
    """Runs out of memory with more than so many samples."""

    def __init__(self, error, most=5):
        super().__init__()
        self.net, self.error, self.most = net(), error, most
        self.sizes = SimpleNamespace(seen=[])  # attributes and lists of the module are put back as they were

    def forward(self, x):
        self.sizes.seen.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.net(x)


ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    "Windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    "driver": RuntimeError("CUDA error: out of memory"),
}


@guards("errors:is_out_of_memory", returns=False)
@pytest.mark.parametrize("name", ERRORS)
def test_when_memory_runs_out_halves_are_measured(name):
    tight = Tight(ERRORS[name])
    found = lf.measure_flatness(tight, [(X, Y), (X, Y)], layers="all")
    expected = lf.measure_flatness(net(), [(X, Y)], layers="all")
    for layer, info in expected.layers.items():
        assert_close(found.layers[f"net.{layer}"].block_traces, info.block_traces, rtol=1e-12, atol=1e-15)
    assert tight.sizes.seen.count(9) == 1, "caught once"
    assert found.num_samples == 18


def test_single_samples_are_measured_when_memory_runs_out():
    found = lf.measure_flatness(Tight(ERRORS["GPU"], most=2), [(X[:3], Y[:3])], layers="net.2")
    expected = lf.measure_flatness(net(), [(X[:3], Y[:3])], layers="2")
    assert_close(found.relative_flatness, expected.relative_flatness, rtol=1e-12, atol=0)


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


def test_tables_among_the_inputs(monkeypatch):
    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x, table):
            return self.c(self.a(x + table.mean(0)).relu())

    torch.manual_seed(3)
    net, table = WithTable().double(), torch.randn(20, 6).double()
    whole = lf.measure_flatness(net, [({"x": VECTORS, "table": table}, LABELS)], layers="a")
    monkeypatch.setattr("lightning_flatness.layers.passes.rows_at_a_time", lambda *args: 3)
    parts = lf.measure_flatness(net, [({"x": VECTORS, "table": table}, LABELS)], layers="a")
    assert whole.num_samples == parts.num_samples == 8
    assert_close(parts.relative_flatness, whole.relative_flatness, rtol=1e-12, atol=0)
    with pytest.raises(lf.BatchError, match="rows of logits for .* samples.*give as many targets"):
        lf.measure_flatness(net, [((VECTORS, table), None)], layers="a")


def test_a_single_sample_that_gives_one_row_although_it_is_given_twice():
    net = linear_net(lambda net, x: net.c(net.a(x[:1]).relu()))
    with pytest.raises(lf.BatchError, match="returns 1 row of logits for 1 sample, which is duplicated for measuring"):
        lf.measure_flatness(net, [(VECTORS[:1], LABELS[:1])], layers="all")


def test_memory_that_runs_out_while_certifying(monkeypatch):
    from lightning_flatness.layers import certify

    net = linear_net()
    expected = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all")
    certified, calls = certify.why_not_affine, []

    def tight(layers, logits, *rest):
        calls.append(len(logits))
        if len(logits) > 4:
            raise torch.OutOfMemoryError("no memory")
        return certified(layers, logits, *rest)

    monkeypatch.setattr(certify, "why_not_affine", tight)
    found = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all")
    assert calls == [8, 4]  # of the second half the graph is enough
    assert found.exact
    for name, layer in expected.layers.items():
        assert_close(found.layers[name].block_traces, layer.block_traces, rtol=1e-12, atol=1e-15)
