"""Other kinds of modules, and precisions."""

import dataclasses

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, module_state
from tests.callbacks.flatness_runs import assert_reports_equal, flatness_callback, run_without_a_trace
from tests.callbacks.lightning_modules import CLASSES, Classifier, Net, TwoLayerNet, WithoutForward, loaders
from tests.guarding import guards


class Gan(L.LightningModule):
    """Two networks, an optimizer for each, no forward; the discriminator also tells classes apart."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = TwoLayerNet()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))

    def training_step(self, batch, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        made = self.generator(torch.randn(len(batch[0]), 3))
        of_generator.zero_grad()
        self.manual_backward(self.discriminator(made).logsumexp(1).mean())
        of_generator.step()
        of_discriminator.zero_grad()
        self.manual_backward(F.cross_entropy(self.discriminator(batch[0]), batch[1]))
        of_discriminator.step()

    def validation_step(self, batch, batch_idx):
        self.discriminator(self.generator(torch.randn(2, 3)))
        self.log("val_acc", (self.discriminator(batch[0]).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=0.01) for network in networks]


class TwoForwards(Classifier):
    """Looks at a batch in several ways, in both modes of gradients."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x) + self.net(x.flip(-1))
        with torch.enable_grad():
            self.net(x[:1])
        self.log("val_acc", (logits.argmax(1) == y).double().mean())


class Reparametrised(nn.Module):
    """Two convolutions, for which every change to evaluation mode makes a new one."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)])

    def train(self, mode=True):
        self._modules.pop("whole", None)
        super().train(mode)
        if not mode:
            self.whole = nn.Conv2d(1, 4, 3).to(self.branches[0].weight)
            for name, tensor in self.whole.named_parameters():
                tensor.data = sum(branch.get_parameter(name).detach() for branch in self.branches)
        return self

    def forward(self, x):
        return self.whole(x) if "whole" in self._modules else sum(branch(x) for branch in self.branches)


def made_anew():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pooled = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return Classifier(nn.Sequential(Reparametrised(), *pooled, nn.Linear(4, CLASSES)))


@pytest.mark.parametrize(
    ("make", "options", "network"),
    [
        (Gan, {"model": "discriminator", "layers": "all"}, "discriminator"),
        (TwoForwards, {}, "net"),
        (WithoutForward, {"model": "net"}, "net"),
        (made_anew, {}, "net"),
    ],
    ids=["gan", "two forwards", "without forward", "made anew"],
)
@pytest.mark.parametrize("data", ["val", "train"])
def test_other_kinds_of_modules(tmp_path, make, options, network, data):
    callback, batches = flatness_callback(data=data, **options), loaders()
    network = getattr(run_without_a_trace(tmp_path, make, callback, data=batches), network)
    expected = lf.measure_flatness(network, batches[data == "val"], layers=options.get("layers", "last"))
    assert_reports_equal(callback.report, expected, prefix="" if "model" in options else "net.")


LOW = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize(("data", "layers"), [("val", "all"), ("train", "last")])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer")
def test_mixed_precision(tmp_path, precision, data, layers):
    callback, batches = flatness_callback(data=data, layers=layers), loaders()
    run = {"data": batches, "precision": precision}
    module = run_without_a_trace(tmp_path, lambda: Classifier(TwoLayerNet()), callback, **run)
    in_double = [(x.double(), y) for x, y in batches[data == "val"]]
    expected = lf.measure_flatness(module.net.double(), in_double, layers=layers)
    assert_reports_equal(callback.report, expected, rtol=0.02)


@pytest.mark.parametrize(("data", "layers"), [("val", "all"), ("train", "last")])
@pytest.mark.parametrize("precision", LOW)
def test_low_precision_is_measured_in_float32(tmp_path, precision, data, layers):
    callback, batches = flatness_callback(data=data, layers=layers), loaders()
    run = {"data": batches, "precision": precision}
    module = run_without_a_trace(tmp_path, lambda: Classifier(TwoLayerNet()), callback, **run)
    assert {parameter.dtype for parameter in module.parameters()} == {LOW[precision]}
    as_given = [(x.to(LOW[precision]).float(), y) for x, y in batches[data == "val"]]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net.float(), as_given, layers=layers))


@pytest.mark.parametrize("dtype", LOW.values(), ids=str)
def test_plain_low_precision_is_measured_in_float32(dtype):
    net = TwoLayerNet().to(dtype)
    state = module_state(net)
    batches = [(x.to(dtype), y) for x, y in loaders()[1]]
    found = lf.measure_flatness(net, batches, layers="all")
    assert_same(module_state(net), state)
    expected = lf.measure_flatness(net.float(), [(x.float(), y) for x, y in batches], layers="all")
    assert_reports_equal(found, expected, prefix="")


def test_reports_that_differ_would_be_seen():
    one = lf.measure_flatness(Net(), loaders()[1])
    layer = one.layers["conv2"]
    other = dataclasses.replace(layer, hessian_trace=layer.hessian_trace * 1.001)
    with pytest.raises(AssertionError, match="not close"):
        assert_reports_equal(one, lf.FlatnessReport({"conv2": other}), prefix="")


def with_lazy_head():
    module = Classifier()
    module.net.fc = nn.LazyLinear(CLASSES)
    return module


@pytest.mark.parametrize("data", ["val", "train"])
def test_lazy_layers_that_get_their_shape_in_training(tmp_path, data):
    callback = flatness_callback(data=data)
    module = run_without_a_trace(tmp_path, with_lazy_head, callback, num_sanity_val_steps=0)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[data == "val"]))


class BuiltInForward(Net):
    """Changes itself in its first forward."""

    def __init__(self, build):
        super().__init__()
        self.build, self.shift, self.head = build, 0, nn.Identity()

    def forward(self, x):
        if self.build is not None:
            self.build(self)
            self.build = None
        return self.head(super().forward(x - self.shift))


def shift(net):
    del net.shift
    net.register_buffer("shift", torch.rand(1))


BUILDS = {
    "hook": lambda net: net.head.register_forward_hook(lambda *args: args[-1] * 1.5),
    "buffer": shift,
    "head": lambda net: setattr(net, "head", nn.Linear(CLASSES, CLASSES)),
}


@guards("callbacks/flatness.py", "and not isinstance(error, UnbuiltError)", "", ids="train-head")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("data", ["val", "train"])
def test_a_network_that_its_first_step_builds(tmp_path, data, build):
    callback = flatness_callback(data=data)
    make = lambda: Classifier(BuiltInForward(BUILDS[build]))  # noqa: E731
    module = run_without_a_trace(tmp_path, make, callback, num_sanity_val_steps=0)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[data == "val"]))
