"""Observed passes in half precision: exact for the features as they are, or not used."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_flatness as lf
from lightning_flatness.errors import FlatnessError
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.model.call import heard_call
from tests.callbacks.compare import assert_same, module_state
from tests.guarding import guards

HALVES = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    """A convolution, a tail and a linear classifier, on maps of 64 positions."""

    def __init__(self, filters=12, activation=F.relu, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem, self.conv = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, filters, 3, padding=1)
            self.fc = nn.Linear(filters, 4)
        self.activation = activation

    def forward(self, x):
        read = self.stem(x).float().tanh().to(x)  # under autocast float32, which the convolution rounds
        return self.fc(self.tail(self.conv(read)).mean((2, 3)))

    def tail(self, z):
        return self.activation(z)


def batch(samples=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 8, 8, generator=generator), torch.randint(4, (samples,), generator=generator)


class Runs:
    """A model that is called as a user calls it: under autocast, or with weights in half precision."""

    def __init__(self, model, kind, half):
        self.model, self.kind, self.half = model.eval(), kind, half
        if kind == "true":
            self.model = model.to(half)

    def modes(self):
        return torch.autocast("cpu", self.half, enabled=self.kind == "mixed")

    def inputs(self, x):
        return x.to(self.half) if self.kind == "true" else x

    def tried(self, x, y, layer="conv"):
        """A measurement, and why it cannot be live."""
        measurement, x = Measurement(self.model, layers=[layer]), self.inputs(x)
        with torch.inference_mode():
            with self.modes():
                call = heard_call((x,), {})
            return measurement, measurement.observer.why_not_live(call, y)

    def observe(self, measurement, x, y):
        x = self.inputs(x)
        with torch.inference_mode(), self.modes():
            expected = self.model(x)
            with measurement.observer.listen(x) as heard:
                output = self.model(x)
        assert heard.reason == ""
        assert_close(output, expected, rtol=0, atol=0)
        measurement.update_observed(heard, y)
        alive = heard.graph()
        heard.release()
        assert alive() is None


@pytest.fixture(params=[(kind, half) for kind in ("mixed", "true") for half in HALVES], ids=str)
def runs(request):
    return lambda model: Runs(model, *request.param)


def of_features(run, x, y):
    """Block traces by autograd's Hessian in float64, of a network that is linear around the features as they are."""
    seen = {}
    model = run.model
    handles = [
        model.conv.register_forward_hook(lambda m, arguments, output: seen.update(read=arguments[0], z=output)),
        model.fc.register_forward_pre_hook(lambda m, arguments: seen.update(g=arguments[0])),
    ]
    with torch.no_grad(), run.modes():
        model(run.inputs(x))
    for handle in handles:
        handle.remove()
    read, g = seen["read"].to(seen["z"].dtype).double(), seen["g"].double()
    active, kernel = (seen["z"] > 0).double(), model.conv.weight.detach().double()
    head, bias = model.fc.weight.detach().double(), model.fc.bias.detach().double()

    def loss(w):
        change = active * (F.conv2d(read, w, padding=1) - F.conv2d(read, kernel, padding=1))
        return F.cross_entropy((g + change.mean((2, 3))) @ head.T + bias, y)

    hessian = torch.autograd.functional.hessian(loss, kernel).reshape(*[len(kernel), kernel[0].numel()] * 2)
    return torch.einsum("sdtd->st", hessian)


@guards("layers/recording.py", "convolution.inputs.to(convolution.output.dtype).float()", "convolution.inputs.float()")
def test_exact_for_the_features_as_they_are(runs):
    run = runs(Net())
    (x, y), before = batch(), module_state(run.model)
    measurement, reason = run.tried(x, y)
    assert reason == ""
    run.observe(measurement, x, y)
    assert_same(module_state(run.model), before)
    (layer,) = measurement.report().layers.values()
    expected = of_features(run, x, y)
    assert_close(layer.block_traces[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert layer.exact
    assert layer.info.precision == str(run.half).removeprefix("torch.")


def test_stated_deviation_is_that_of_the_first_samples(runs):
    run, (x, y) = runs(Net(activation=F.silu)), batch()
    (measurement, reason), (first, _) = run.tried(x, y), run.tried(x, y)
    assert reason == ""
    run.observe(measurement, x, y)
    run.observe(first, x[:4], y[:4])
    in_float32 = lf.measure_flatness(
        copy.deepcopy(run.model).float(), [(run.inputs(x[:4]).float(), y[:4])], layers=["conv"]
    )
    change = first.report().hessian_trace / in_float32.hessian_trace - 1
    assert measurement.report().precision_deviation == pytest.approx(change, rel=1e-6, abs=1e-9)
    assert 0 < abs(change) < 0.02


class Dies(Net):
    """Most filters are not active on the first samples; the features are in another order than the filters."""

    def tail(self, z):
        return torch.cat([self.activation(z)[:, 6:], self.activation(z)[:, :6]], dim=1)


@guards("layers.certificates.tail:_channels_by_bits", body="return known")
@pytest.mark.parametrize("filters", [12, 300])
def test_filters_that_become_active_later(runs, filters):
    """300 channels: half precision has no numbers from 257 to 299 that are odd."""
    model, (x, y) = Dies(filters), batch()
    with torch.no_grad():
        model.stem.weight.abs_()
        model.conv.weight[1:].abs_()
        model.conv.bias[1:] = -0.3
        x = x.abs()
        x[:4] = -x[:4]  # not active
    run = runs(model)
    measurement, reason = run.tried(x, y)
    assert reason == ""
    tail = measurement.observer._observable.known.layers["conv"].tail.value
    assert len(tail.unknown) > filters // 2
    run.observe(measurement, x, y)
    tail = measurement.observer._observable.known.layers["conv"].tail.value
    assert len(tail.unknown) < filters // 2
    position = torch.arange(filters).roll(filters - 6)  # of entries: which filter each is
    expected = torch.empty_like(position).scatter(0, position, torch.arange(filters))
    assert_close(tail.channels[tail.channels >= 0], expected[tail.channels >= 0])
    own = lf.measure_flatness(copy.deepcopy(run.model).float(), [(run.inputs(x).float(), y)], layers=["conv"])
    assert measurement.report().hessian_trace == pytest.approx(own.hessian_trace, rel=0.02)


class Later(Net):
    """From the thirteenth sample on, another tail: the same operations on some samples, then others."""

    def tail(self, z):
        return F.relu(z) if len(z) < 9 else F.leaky_relu(z)


@guards("layers/certificates/tail.py", "if known.fingerprint not in (None, operations):", "if False:")
def test_other_operations_are_not_followed(runs):
    run, (x, y) = runs(Later()), batch()
    measurement, reason = run.tried(x, y)
    assert reason == ""
    run.observe(measurement, x[:8], y[:8])
    with pytest.raises(FlatnessError, match="the operations after this layer differ"):
        run.observe(measurement, x, y)


class Indexes(Net):
    def tail(self, z):
        return self.activation(z)[:, torch.arange(z.shape[1])]


def test_operations_that_names_do_not_tell_are_not_observed(runs):
    reason = runs(Indexes()).tried(*batch())[1]
    assert "after this layer there is a custom operation, an operation such as indexing" in reason


class OtherInHalf(Net):
    def tail(self, z):
        return self.activation(z) * (1 if z.dtype == torch.float32 else 1.3)


@guards("layers/trial.py", "deviation <= (allowed if observable.half is None else ROUNDED)", "deviation <= 1e9")
def test_other_numbers_in_half_precision_are_not_accepted(runs):
    assert "differ by" in runs(OtherInHalf()).tried(*batch())[1]


class Swapped(Net):
    """A classifier with other weights on larger batches, behind autograd's back."""

    def forward(self, x):
        if len(x) < 9:
            return super().forward(x)
        before = self.fc.weight.data.clone()
        self.fc.weight.data.mul_(1.5)
        try:
            return super().forward(x)
        finally:
            self.fc.weight.data.copy_(before)


@guards("layers.certificates.head:_certify_rounded", returns=None)
def test_another_classifier_is_seen(runs):
    run, (x, y) = runs(Swapped()), batch()
    measurement, reason = run.tried(x, y)
    assert reason == ""
    run.observe(measurement, x[:8], y[:8])
    with pytest.raises(FlatnessError, match="does not return weight"):
        run.observe(measurement, x, y)


class OtherKernel(Net):
    """A kernel in half precision that is another one on larger batches, behind autograd's back."""

    def forward(self, x):
        if len(x) < 9:
            return super().forward(x)
        with torch._C.DisableTorchFunction():
            before = self.conv.weight.data.clone()
            self.conv.weight.data.mul_(1.5)
        try:
            return super().forward(x)
        finally:
            with torch._C.DisableTorchFunction():
                self.conv.weight.data.copy_(before)


@guards("layers/certificates/layer.py", "same(call.kernel_sample, kernel.sample)", "True")
def test_another_kernel_is_seen(runs):
    run, (x, y) = runs(OtherKernel()), batch()
    measurement, reason = run.tried(x, y)
    assert reason == ""
    with pytest.raises(FlatnessError, match="has changed since it was certified"):
        run.observe(measurement, x, y)


class Scales(Net):
    """Its tail has weights of its own."""

    def __init__(self):
        super().__init__(filters=5)
        self.scale = nn.Conv2d(5, 5, 1, groups=5)

    def tail(self, z):
        return self.scale(F.relu(z))


class Casts(TorchDispatchMode):
    """Counts casts."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_to_copy"
        return func(*args, **(kwargs or {}))


@guards("layers/recording.py", "            torch.set_autocast_cache_enabled(False)\n", "", ids="inference_mode")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_the_cache_of_autocast_is_left_as_without(mode):
    """A weight in the tail is cast while gradients are on, which autocast would keep, with its graph."""
    model, (x, y) = Scales().eval(), batch()
    found = []
    for observes in (False, True):
        observer = FlatnessObserver(model, layers=["conv"])
        observer(x, y)
        recorder = observer._own.context.recorder if observes else None
        with mode(), torch.autocast("cpu", torch.bfloat16):
            with Listener(model, recorder) as heard:
                output = model(x)
            assert not observes or heard.reason == ""
            with torch.inference_mode(False), torch.no_grad(), Casts() as casts:
                again = model.scale(torch.zeros(1, 5, 1, 1))
            found.append([output, again, casts.count, torch.is_autocast_cache_enabled()])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_have_their_names(dtype):
    x, y = batch()
    report = lf.measure_flatness(Net().to(dtype), [(x.to(dtype), y)], layers="all")
    assert report.precision == str(dtype).removeprefix("torch.")
    assert report.precision_deviation == 0
    assert "Features are" not in str(report)


@guards("layers/recording.py", "convolution.inputs.to(convolution.output.dtype)", "convolution.inputs")
def test_the_classifier_is_exact_for_its_features_as_they_are(runs):
    """The features are rounded as the classifier rounds them; the softmax is that of the float32 logits."""

    class Averaged(Net):
        def forward(self, x):  # under autocast float32, which the classifier rounds
            return self.fc(self.tail(self.conv(self.stem(x))).float().mean((2, 3)).to(x))

    run, (x, y) = runs(Averaged()), batch()
    measurement, reason = run.tried(x, y, layer="fc")
    assert reason == ""
    run.observe(measurement, x, y)
    measurement.take_spread()
    measurement.measure_held()
    layer = measurement.report().layers["fc"]
    seen = {}
    handle = run.model.fc.register_forward_hook(lambda m, arguments, output: seen.update(g=arguments[0], z=output))
    with torch.no_grad(), run.modes():
        run.model(run.inputs(x))
    handle.remove()
    g, weight, bias = seen["g"].float(), run.model.fc.weight.detach().float(), run.model.fc.bias.detach().float()
    pi = (g @ weight.T + bias).double().softmax(1)
    norms = g.to(seen["z"].dtype).double().square().sum(1)
    expected = (norms[:, None, None] * (torch.diag_embed(pi) - pi[:, :, None] * pi[:, None])).mean(0)
    assert layer.exact
    assert layer.info.precision == str(run.half).removeprefix("torch.")
    assert_close(layer.block_traces[0], expected, rtol=1e-6, atol=1e-9)
