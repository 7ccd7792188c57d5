"""The measures that stay the same when the layer before rescales its channels (docs/theory.md, "Invariance")."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from lightning_flatness.functional import channels
from lightning_flatness.layers.options import ALL_MEASURES
from lightning_flatness.measure import samples
from tests.guarding import guards

BOTH = ("normalized_relative_flatness", "channelwise_flatness")
CLASSES = 3


class Net(nn.Module):
    """Two branches that are concatenated, and a layer that reads them."""

    def __init__(self, seed, groups=1, activation=nn.ReLU, dead=False, norm=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one, self.two = nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2, stride=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv = nn.Conv2d(4, 4, 2, groups=groups, padding=1)
        self.activation = activation()
        self.head = nn.Linear(4, CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        if norm:
            self.norm.running_mean.copy_(torch.randn(4, generator=generator))
            self.norm.running_var.copy_(torch.rand(4, generator=generator) + 0.5)
        if dead:
            with torch.no_grad():
                self.one.weight[0] = 0.0  # a constant channel
        self.double().eval()

    def forward(self, x):
        read = self.norm(torch.cat([self.one(x).relu(), self.two(x).tanh()], dim=1))
        return self.head(self.activation(self.conv(read)).mean((2, 3)))


def data(seed, number=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (number,), generator=generator)


def rescaled(net, seed):
    """Rescale the channels that the layer reads, and its filters; undo both where they are read."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed + 1000)
    read, own = (10 ** (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1) for _ in range(2))
    groups = net.conv.groups
    with torch.no_grad():
        if isinstance(net.norm, nn.BatchNorm2d):
            net.norm.weight.mul_(read)
            net.norm.bias.mul_(read)
        else:
            net.one.weight.mul_(read[:2, None, None, None])
            net.one.bias.mul_(read[:2])
            read[2:] = 1.0  # tanh does not pass a factor on
        if not isinstance(net.activation, nn.ReLU):
            own[:] = 1.0  # nor does a curved activation
        by_group = read.view(groups, 1, -1, 1, 1).expand(groups, 4 // groups, -1, 1, 1)
        net.conv.weight.div_(by_group.reshape(4, -1, 1, 1))
        net.conv.weight.mul_(own[:, None, None, None])
        net.conv.bias.mul_(own)
        net.head.weight.div_(own)
    return net


def definition(net, name, x, y):
    """Return both measures of a layer from the dense Hessian and the inputs that the layer read."""
    module, read = net.get_submodule(name), []
    handle = module.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].detach()))
    net(x)
    handle.remove()
    inputs = read[0].movedim(-1, 1) if isinstance(module, nn.Linear) else read[0]
    inputs = inputs.reshape(*inputs.shape[:2], -1)
    weight = module.weight.detach()
    dense = hessian(lambda w: cross_entropy(functional_call(net, {f"{name}.weight": w}, (x,)), y))(weight)
    filters, width = weight.shape[:2]
    groups, per_group = getattr(module, "groups", 1), filters // getattr(module, "groups", 1)
    rows = weight.reshape(filters, width, -1)
    dense = dense.reshape(*rows.shape, *rows.shape)
    traces = torch.einsum("scktck->sct", dense)  # Tr H_{sc, tc}
    products = torch.einsum("sck,tck->sct", rows, rows)
    deviations = inputs.transpose(0, 1).flatten(1).std(1, unbiased=False)
    normalized = channelwise = 0.0
    for group in range(groups):
        own = slice(group * per_group, (group + 1) * per_group)
        spread = deviations[group * width : (group + 1) * width]
        alive = spread > 1e-12
        gram = (products[own, :, own] * spread[None, :, None].square())[:, alive].sum(1)
        block = (traces[own, :, own] / spread[None, :, None].square())[:, alive].sum(1)
        normalized += float((gram * block).sum())
        channelwise += float((products[own, :, own] * traces[own, :, own]).sum())
    return {"normalized_relative_flatness": normalized, "channelwise_flatness": channelwise}


def measure(net, batches, **options):
    return lf.measure_flatness(net, batches, measures=ALL_MEASURES, **options)


KINDS = [
    {},
    {"groups": 2},
    {"activation": nn.SiLU},
    {"dead": True},
    {"norm": True},
    {"norm": True, "groups": 2, "activation": nn.GELU},
]


@guards("functional/weighting.py", "return inputs * self.inverse", "return inputs * self.inverse.square()")
@guards("layers/closed_form.py", "scaled = of_filters(weighting.scaled(inputs))", "scaled = of_filters(inputs)")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_are_those_of_the_dense_hessian(kind):
    net, (x, y) = Net(1, **kind), data(1)
    report = measure(net, [(x, y)], layers=["conv", "head"])
    for name, layer in report.layers.items():
        assert layer.exact
        expected = definition(net, name, x, y)
        for measure_name in BOTH:
            assert getattr(layer, measure_name) == pytest.approx(expected[measure_name], rel=1e-10), name
    assert report.layers["conv"].num_dead_channels == kind.get("dead", 0)


def test_gauss_newton_gives_the_same():
    """A layer before a max-pooling is measured by Gauss-Newton, from its inputs or from their Gram matrix."""

    class Pooled(Net):
        def forward(self, x):
            read = torch.cat([self.one(x).relu(), self.two(x).tanh()], dim=1)
            return self.head(nn.functional.max_pool2d(self.conv(read).relu(), 2).flatten(1)[:, :4])

    net, (x, y) = Pooled(2), data(2)
    (layer,) = measure(net, [(x, y)], layers=["conv"]).layers.values()
    assert (layer.method, layer.exact) == ("gauss_newton", True)
    expected = definition(net, "conv", x, y)
    for name in BOTH:
        assert getattr(layer, name) == pytest.approx(expected[name], rel=1e-10), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_they_stay_and_relative_flatness_moves(kind):
    moved = []
    for seed in range(17):
        net, batches = Net(seed, **kind), [data(seed)]
        other = rescaled(net, seed)
        torch.testing.assert_close(other(batches[0][0]), net(batches[0][0]), rtol=1e-11, atol=1e-11)
        before, after = (measure(one, batches, layers=["conv"]).layers["conv"] for one in (net, other))
        assert after.num_dead_channels == before.num_dead_channels
        for name in BOTH:
            assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9), name
        moved.append(after.relative_flatness / before.relative_flatness)
    assert max(moved) > 2 or min(moved) < 0.5


@guards("measure/measurement.py", "inputs.clone() if isinstance", "inputs if isinstance", ids="no closed form-tensor")
@guards("measure/measurement.py", "as_call(inputs).copied()", "as_call(inputs)", ids="no closed form-mapping")
@guards(
    "measure/measurement.py", "None if targets is None else targets.clone()", "targets", ids="no closed form-tensor"
)
@pytest.mark.parametrize("given", [lambda x: x, lambda x: {"x": x}], ids=["tensor", "mapping"])
@pytest.mark.parametrize(
    "activation", [nn.ReLU, lambda: nn.LayerNorm([4, 5, 5])], ids=["closed form", "no closed form"]
)
def test_batches_do_not_matter(monkeypatch, given, activation):
    monkeypatch.setattr(samples, "FIRST_SAMPLES", 8)
    monkeypatch.setattr("lightning_flatness.measure.measurement.FIRST_SAMPLES", 8)
    net, (x, y) = Net(3, activation=activation), data(3, number=11)
    whole = measure(net, [(x, y)])
    spread = channels.ChannelSums.of(read_by(net, x[:8])).total().deviations()

    def overwritten():  # every batch in the same memory
        memory, labels = torch.empty(3, *x.shape[1:], dtype=x.dtype), torch.empty(3, dtype=y.dtype)
        for start in range(0, 11, 3):
            rows = len(x[start : start + 3])
            memory[:rows], labels[:rows] = x[start : start + 3], y[start : start + 3]
            yield given(memory[:rows]), labels[:rows]

    for batches in ([(x[:7], y[:7]), (x[7:], y[7:])], overwritten()):
        report = measure(net, batches)
        for name in (*BOTH, "relative_flatness", "hessian_trace"):
            assert getattr(report.layers["conv"], name) == pytest.approx(getattr(whole.layers["conv"], name), rel=1e-12)
        assert report.sampling_errors == pytest.approx(whole.sampling_errors, rel=1e-9)
    layer = whole.layers["conv"]
    of_eight = measure(net, [(x[:8], y[:8])]).layers["conv"]
    assert layer.normalized_relative_flatness != pytest.approx(of_eight.normalized_relative_flatness, rel=1e-3)
    assert spread.shape == (4,)


def read_by(net, x):
    read = []
    handle = net.conv.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].detach()))
    net(x)
    handle.remove()
    return read[0]


def test_what_is_not_asked_for_is_not_measured():
    net, batch = Net(4), data(4)
    report = lf.measure_flatness(net, [batch])
    assert report.normalized_relative_flatness > 0
    assert report.layers["conv"].channelwise_flatness != report.layers["conv"].channelwise_flatness
    plain = lf.measure_flatness(net, [batch], measures=("hessian_trace", "relative_flatness"))
    assert plain.normalized_relative_flatness != plain.normalized_relative_flatness
    assert plain.relative_flatness == pytest.approx(report.relative_flatness, rel=1e-12)


@pytest.mark.parametrize("residual", [None, "hutchinson"])
def test_many_classes_and_estimates_stay_within_their_errors(residual):
    """150 classes are sampled, or classes are left out; a curved network has its residual estimated."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4, 150)).double()
    x, _ = data(5, number=6)
    y = torch.arange(6) * 20
    options = {"layers": ["0", "2"], "measures": ALL_MEASURES, "residual": residual, "num_probes": 400}
    report = lf.measure_flatness(net, [(x, y)], **options)
    exact = lf.measure_flatness(net, [(x, y)], **options | {"tolerance": 0.0})
    for name in BOTH:
        assert getattr(report.layers["2"], name) == pytest.approx(getattr(exact.layers["2"], name), rel=1e-5)
        error = report.layers["0"].standard_errors[name]
        assert abs(getattr(report.layers["0"], name) - getattr(exact.layers["0"], name)) <= 5 * error + 1e-12
    if residual:
        expected = definition(net, "0", x, y)
        for name in BOTH:
            error = exact.layers["0"].standard_errors[name]
            assert error > 0
            assert abs(getattr(exact.layers["0"], name) - expected[name]) <= 5 * error


@guards("layers/convolution.py", "return self.inputs if self.unpadded is None else self.unpadded", "return self.inputs")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 3])
def test_padding_with_zeros_does_not_count(kernel):
    generator = torch.Generator().manual_seed(6)
    x, y = data(6)
    layers = nn.Conv2d(2, 4, kernel, padding="same"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    net = nn.Sequential(*layers).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    (layer,) = measure(net, [(x + 2, y)]).layers.values()
    expected = definition(net, "0", x + 2, y)
    for name in BOTH:
        assert getattr(layer, name) == pytest.approx(expected[name], rel=1e-10), name
