"""Every layer of small networks of each kind: exact where it says so, the Gauss-Newton part where it says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.errors import NotClosedFormError
from lightning_flatness.testing import oracle_block_traces
from tests.jacobians import jacobian_block_traces
from tests.networks import randomise_statistics


def block(inputs, outputs, activation, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), activation())


class Residual(nn.Module):
    def __init__(self, channels, activation):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.activation = activation()

    def forward(self, x):
        return self.activation(x + self.conv2(self.activation(self.conv1(x))))


class Dense(Residual):
    def forward(self, x):
        return torch.cat([x, self.conv2(self.activation(self.conv1(x)))], dim=1)


class Inception(Residual):
    def forward(self, x):
        return torch.cat([self.conv1(x), F.max_pool2d(self.conv2(x), 3, 1, 1)], dim=1).relu()


class SqueezeExcite(nn.Module):
    def __init__(self, channels, activation):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Attention(nn.Module):
    """One head of attention, a ReLU MLP, no normalisation."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, 5), nn.Linear(5, width)

    def forward(self, x):
        x = x.flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + (q @ k.mT).softmax(-1) @ v
        return (x + self.down(self.up(x).relu())).mean(1)


class Siamese(nn.Module):
    """One convolution on two inputs: used twice, and the logits still affine in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x):
        return (self.conv(x) + self.conv(x.flip(3)).relu()).mean((2, 3))


class Recurrent(Siamese):
    """One convolution that runs on its own output: the logits are a polynomial of its kernel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.mix = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.mix(self.conv(self.conv(x).relu())).mean((2, 3))


def head(width, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def kinds(activation, classes):
    c, a = classes, activation
    return {
        "plain": lambda: nn.Sequential(block(2, 4, a), block(4, 3, a, stride=2), head(3, c)),
        "residual": lambda: nn.Sequential(block(2, 3, a), Residual(3, a), Residual(3, a), head(3, c)),
        "dense": lambda: nn.Sequential(block(2, 3, a), Dense(3, a), head(6, c)),
        "inception": lambda: nn.Sequential(block(2, 3, a), Inception(3, a), head(6, c)),
        "squeeze-excite": lambda: nn.Sequential(block(2, 3, a), SqueezeExcite(3, a), block(3, 2, a), head(2, c)),
        "grouped": lambda: nn.Sequential(block(2, 4, a, groups=2), block(4, 4, a, groups=4), head(4, c)),
        "max-pool": lambda: nn.Sequential(block(2, 3, a), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2), head(3, c)),
        "two-layer head": lambda: nn.Sequential(
            block(2, 3, a), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), a(), nn.Linear(5, c)
        ),
        "no convolution": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), a(), nn.Linear(4, c)),
        "attention": lambda: nn.Sequential(nn.Conv2d(2, 4, 2, stride=2), Attention(4), nn.Linear(4, c)),
        "recurrent": lambda: nn.Sequential(Recurrent(), nn.Linear(3, c)),
        "siamese": lambda: nn.Sequential(Siamese(), nn.Linear(3, c)),
    }


def across_groups(blocks):
    return torch.block_diag(*torch.ones_like(blocks)) == 0


KINDS = sorted(kinds(nn.ReLU, 2))


ARGUMENTS = {
    "kind": st.sampled_from(KINDS),
    "activation": st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.SiLU]),
    "classes": st.integers(2, 5),
    "samples": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
}


@given(**ARGUMENTS)
@settings(max_examples=15)
def test_every_layer_is_what_it_says(kind, activation, classes, samples, seed):
    assert_every_layer_is_what_it_says(kind, activation, classes, samples, seed)


@pytest.mark.slow
@given(**ARGUMENTS)
@settings(max_examples=200)
def test_every_layer_of_many_more_networks_is_what_it_says(kind, activation, classes, samples, seed):
    assert_every_layer_is_what_it_says(kind, activation, classes, samples, seed)


def assert_every_layer_is_what_it_says(kind, activation, classes, samples, seed):
    torch.manual_seed(seed)
    net = randomise_statistics(kinds(activation, classes)[kind]()).double().eval()
    x, y = torch.randn(samples, 2, 4, 4).double(), torch.randint(classes, (samples,))
    for name, layer in lf.measure_flatness(net, [(x, y)], layers="all").layers.items():
        found = torch.block_diag(*layer.block_traces)
        gauss_newton = jacobian_block_traces(net, x, name)
        hessian = oracle_block_traces(net, (x, y), name)
        expected = (hessian if layer.exact else gauss_newton).masked_fill(across_groups(layer.block_traces), 0)
        scale = max(float(expected.detach().abs().max()), 1e-12)
        assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}")


INEXACT = {
    "squeeze-excite": {"0.0", "1.conv", "1.squeeze", "1.excite"},
    "attention": {"0", "1.qkv"},
    "recurrent": {"0.conv"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_relu_networks_are_certified(kind):
    inexact = INEXACT.get(kind, set())
    net = randomise_statistics(kinds(nn.ReLU, 3)[kind]()).double()
    report = lf.measure_flatness(net, [torch.randn(4, 2, 4, 4).double()], layers="all")
    assert {name for name, layer in report.layers.items() if not layer.exact} == inexact
    assert all(report.layers[name].info.reason for name in inexact)
    assert report.exact == (not inexact)


def test_both_methods_agree_where_both_apply(monkeypatch):
    net = randomise_statistics(kinds(nn.ReLU, 4)["residual"]()).double()
    batch = [(torch.randn(5, 2, 4, 4).double(), torch.randint(4, (5,)))]
    closed_form = lf.measure_flatness(net, batch).layers["2.conv2"]

    def refuse(*args):
        raise NotClosedFormError("not today")

    monkeypatch.setattr("lightning_flatness.layers.certify.certify_head", refuse)
    gauss_newton = lf.measure_flatness(net, batch).layers["2.conv2"]
    assert (closed_form.method, gauss_newton.method) == ("closed_form", "gauss_newton")
    assert closed_form.exact
    assert gauss_newton.exact
    assert_close(gauss_newton.block_traces, closed_form.block_traces, rtol=1e-11, atol=1e-14)


def test_classifier_has_its_formula():
    net = kinds(nn.ReLU, 3)["plain"]().double().eval()
    x = torch.randn(4, 2, 4, 4).double()
    features, pi = net[:2](x).mean((2, 3)), net(x).softmax(1)
    curvature = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    expected = (features.square().sum(1)[:, None, None] * curvature).mean(0).detach()
    report = lf.measure_flatness(net, [x], layers="classifier")
    assert_close(report.layers["2.2"].block_traces[0], expected, rtol=1e-12, atol=1e-15)


def test_strict_refuses_what_is_not_exact():
    net = kinds(nn.SiLU, 3)["plain"]().double()
    batch = [(torch.randn(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 0]))]
    assert lf.measure_flatness(net, batch, strict=True).exact
    with pytest.raises(lf.NotExactError, match="'0.0'.*Gauss-Newton.*curved"):
        lf.measure_flatness(net, batch, layers="all", strict=True)


def test_columns_in_chunks_give_the_same(monkeypatch):
    net = randomise_statistics(kinds(nn.ReLU, 5)["inception"]()).double()
    batch = [torch.randn(4, 2, 4, 4).double()]
    whole = lf.measure_flatness(net, batch, layers="all")
    monkeypatch.setattr("lightning_flatness.layers.gauss_newton.ELEMENTS", {"cpu": 1})
    parts = lf.measure_flatness(net, batch, layers="all")
    for name in whole.layers:
        assert_close(parts.layers[name].block_traces, whole.layers[name].block_traces, rtol=1e-12, atol=1e-15)


def test_recurrent_modules_are_refused_by_name():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x.flatten(2))[0][:, -1])

    net, x = Tagger().double(), torch.randn(3, 6, 2, 2).double()
    with pytest.raises(lf.LayerSelectionError, match="'rnn' is a RNN, not a convolution or linear layer"):
        lf.measure_flatness(net, [x], layers="rnn")
    assert list(lf.measure_flatness(net, [x], layers="all").layers) == ["head"]


def test_progress_is_shown_on_request(capsys):
    net = kinds(nn.ReLU, 5)["plain"]().double()
    batches = [torch.randn(4, 2, 4, 4).double()] * 3
    lf.measure_flatness(net, batches, layers="all", progress=True)
    assert "Flatness" in capsys.readouterr().err
    lf.measure_flatness(net, batches, layers="all")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
