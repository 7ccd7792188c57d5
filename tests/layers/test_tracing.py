"""Convolutions that run in other ways than as a torch module that is called, and which layer is the last one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards
from tests.layers.own_layers import Blur, Direct, Own, OwnLinear, Scaled, X, Y, network


def test_a_head_of_ones_own_is_the_classifier():
    net = network(nn.Conv2d(4, 5, 3), OwnLinear(5, 3))
    report = lf.measure_flatness(net, [(X, Y)], layers=["2", "6"])
    assert report.layers["2"].info.classifier == "6"
    for name, layer in report.layers.items():
        assert layer.exact
        assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), name), rtol=1e-9, atol=1e-12)
    assert list(lf.measure_flatness(net, [(X, Y)], layers="classifier").layers) == ["6"]


@pytest.mark.parametrize("registered", [True, False])
def test_a_fixed_filter_is_no_layer(registered):
    net = network(nn.Sequential(nn.Conv2d(4, 5, 3), Blur(5, registered)))
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert (list(report.layers), report.left_out) == (["0", "2.0", "6"], {})
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["2.0"]


class Root(nn.Module):
    """A network whose forward applies the kernel of its last convolution in its own way."""

    def __init__(self, apply):
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 3)
        self.kernel, self.apply_last = nn.Parameter(0.2 * torch.randn(5, 4, 3, 3)), apply

    def forward(self, x):
        return self.head(self.apply_last(self, self.first(x).relu()).relu().mean((2, 3)))


HIDDEN = {
    "forward": (lambda: Root(lambda net, x: net.last.forward(x)), "last", r"layer.forward\(x\).*call it"),
    "function": (lambda: Root(lambda net, x: F.conv2d(x, net.last.weight)), "last", "function that takes the weight"),
    "data": (lambda: Root(lambda net, x: F.conv2d(x, net.last.weight.data)), "last", "function that takes the weight"),
    "detached": (lambda: Root(lambda net, x: F.conv2d(x, net.last.weight.detach())), "last", "without calling"),
    "own parameter": (
        lambda: Root(lambda net, x: F.conv2d(x, net.kernel)),
        "kernel",
        "applies a convolution of its own",
    ),
    "computed": (
        lambda: Root(lambda net, x: F.conv2d(x, net.kernel * 2)),
        "forward",
        "applies a convolution of its own",
    ),
    "in a module": (lambda: network(Direct(4, 5)), "2.inner", "without calling the layer"),
    "changed": (lambda: network(Scaled(4, 5)), "2", "does more than that"),
}


@guards(
    "layers.selection:_last", body="return next(c.name for c in reversed(traced.calls) if c.convolves)", ids="forward"
)
@pytest.mark.parametrize("kind", HIDDEN)
def test_what_no_hook_sees_is_named(kind):
    make, name, reason = HIDDEN[kind]
    net = make().double()
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert list(report.left_out) == [name]
    assert name not in report.layers
    with pytest.raises(lf.LayerSelectionError, match=f"'last': '{name}' runs after '(first|0)'.*{reason}"):
        lf.measure_flatness(net, [(X, Y)])
    with pytest.raises(lf.LayerSelectionError, match=f"'last': '{name}' runs after"):
        lf.measure_lambda_max(net, [(X, Y)])
    if name not in ("kernel", "forward"):
        with pytest.raises(lf.LayerSelectionError, match=reason):
            lf.measure_flatness(net, [(X, Y)], layers=name)


class Headed(nn.Module):
    """A network with a hidden linear layer, whose forward applies its head in its own way."""

    def __init__(self, apply):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 5), nn.Linear(5, 3)
        self.apply_head = apply

    def forward(self, x):
        return self.apply_head(self, self.fc(self.conv(x).relu().mean((2, 3))).relu())


HEADS = {
    "forward": (lambda net, g: net.head.forward(g), "head"),
    "function": (lambda net, g: F.linear(g, net.head.weight), "head"),
    "computed": (lambda net, g: F.linear(g, F.normalize(net.head.weight)), "forward"),
}


@guards("layers/selection.py", "hidden.calls_before == len(traced.calls)", "False", ids="forward")
@pytest.mark.parametrize("kind", HEADS)
def test_a_hidden_layer_is_not_the_classifier(kind):
    apply, name = HEADS[kind]
    net = Headed(apply).double()
    with pytest.raises(lf.LayerSelectionError, match=f"'classifier': '{name}' runs after 'fc' and cannot be measured"):
        lf.measure_flatness(net, [(X, Y)], layers="classifier")
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["conv"]


class TwoHeads(nn.Module):
    """A network with two heads on curved features; ``other`` computes what follows the first one, from the features."""

    def __init__(self, other):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.box = nn.Conv2d(2, 4, 3), nn.Linear(4, 3), nn.Linear(4, 2)
        self.mask, self.other = nn.Conv2d(4, 1, 1), other

    def forward(self, x):
        h = F.gelu(self.conv(x))
        return {"logits": self.fc(input=h.mean((2, 3))), "other": self.other(self, h)}


OTHERS = {
    "linear": lambda net, h: net.box(h.mean((2, 3))),
    "convolution": lambda net, h: net.mask(h),
    "hidden": lambda net, h: F.conv2d(h, net.mask.weight),
    "projection": lambda net, h: F.linear(h.mean((2, 3)), net.conv.bias[None]),
}


@guards("layers.tracing:_Tracing.last_call", returns=None)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_runs_after_the_classifier_for_something_else(kind):
    net = TwoHeads(OTHERS[kind]).double()
    for layers, name in (("last", "conv"), ("classifier", "fc")):
        (layer,) = lf.measure_flatness(net, [(X, Y)], layers=layers).layers.values()
        assert (layer.info.name, layer.exact) == (name, True)
        expected = oracle_block_traces(
            net, (X, Y), name, loss_function=lambda out, y: F.cross_entropy(out["logits"], y)
        )
        assert_close(layer.block_traces[0], expected, rtol=1e-9, atol=1e-12)


@guards("layers/tracing.py", " and version_of(output) == version", "", ids="mul_")
@guards(
    "layers/tracing.py", "output.flatten(1).is_set_to(logits)", "torch.equal(output.flatten(1), logits)", ids="plus"
)
@pytest.mark.parametrize(
    "change", [lambda z: z * 2, lambda z: z.mul_(2), lambda z: z + 0], ids=["times", "mul_", "plus"]
)
def test_logits_that_are_computed_from_an_output_do_not_make_it_the_classifier(change):
    """The last linear layer stays the classifier, also where an adapter that is zero at first adds nothing."""

    class Changes(TwoHeads):
        def forward(self, x):
            g = self.conv(x).relu().mean((2, 3))
            logits = change(self.fc(g))
            return {"logits": logits, "other": self.box(g)}

    net = Changes(None).double()
    with pytest.raises(lf.LayerSelectionError, match="'box': the logits do not depend"):
        lf.measure_flatness(net, [(X, Y)], layers="classifier")


def test_a_head_that_takes_its_input_by_keyword():
    class Keyword(Headed):
        def forward(self, x):
            return self.head(input=F.gelu(self.conv(x)).mean((2, 3), keepdim=True)).flatten(1)

    net = Keyword(None).double()
    net.head = nn.Conv2d(4, 3, 1).double()
    for layers, name in (("last", "conv"), ("classifier", "head")):
        (layer,) = lf.measure_flatness(net, [(X, Y)], layers=layers, strict=True).layers.values()
        assert layer.info.name == name
        assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), name), rtol=1e-9, atol=1e-12)


def test_what_runs_before_the_last_convolution_does_not_matter():
    net = nn.Sequential(Scaled(2, 2), *network(nn.Conv2d(4, 5, 3))).double()
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["3"]


class Mixer(nn.Module):
    """Patches, then linear layers of tokens."""

    def __init__(self, last_on_features=False):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 3, stride=3)
        self.fc1, self.fc2, self.pool, self.head = (nn.Linear(6, size) for size in (8, 6, 6, 3))
        self.fc2 = nn.Linear(8, 6)
        self.last_on_features = last_on_features

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        features = (tokens + self.fc2(self.fc1(tokens).relu())).mean(1)
        return self.head(self.pool(features).relu() if self.last_on_features else features)


@pytest.mark.parametrize("last_on_features", [False, True])
def test_the_last_layer_of_tokens_is_the_last_one(last_on_features):
    """A linear layer of every token is a convolution of size one; one of pooled features, before the head, is none."""
    torch.manual_seed(0)
    net = Mixer(last_on_features).double()
    (layer,) = lf.measure_flatness(net, [(X, Y)]).layers.values()
    assert layer.info.name == "fc2"
    assert layer.exact
    assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), "fc2"), rtol=1e-9, atol=1e-12)


def test_the_linear_layers_of_a_head_are_not_the_last_convolution():
    head = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    assert list(lf.measure_flatness(network(nn.Conv2d(4, 5, 3), head), [(X, Y)]).layers) == ["2"]


def test_lazy_layers_without_a_shape_are_refused():
    net = network(nn.LazyConv2d(5, 3))
    for measure in (lf.measure_flatness, lf.measure_lambda_max, lf.hessian_spectrum, lf.loss_landscape):
        with pytest.raises(lf.FlatnessError, match="'2.weight' has no shape yet.*call the model once"):
            measure(net, [(X, Y)])
    net(X)
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["2"]


@guards("layers/tracing.py", "always_call=True", "always_call=False")
def test_an_error_that_the_forward_catches():
    class Tries(Own):
        def __init__(self):
            super().__init__(4, 5)
            self.wide = nn.Conv2d(9, 5, 3)

        def forward(self, x):
            try:
                return self.wide(x)
            except RuntimeError:
                return super().forward(x)

    assert list(lf.measure_flatness(network(Tries()), [(X, Y)]).layers) == ["2"]
