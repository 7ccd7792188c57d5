"""Whatever happens in a measurement, the user finds everything as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.recording import Observation
from tests.networks import randomise_statistics


class UserError(RuntimeError):
    """What a user's forward raises."""


class Spot(nn.Module):
    """A place in a network where a test makes something happen, from its ``on_call``-th call on."""

    def __init__(self):
        super().__init__()
        self.action, self.on_call, self.calls = None, 1, 0

    def forward(self, x):
        self.calls += 1
        return self.action(x) if self.action and self.calls >= self.on_call else x


class LayerWithSpot(nn.Conv2d):
    """A convolution that can fail on its way."""

    def __init__(self, *args):
        super().__init__(*args)
        self.spot = Spot()

    def forward(self, x):
        return super().forward(self.spot(x))


class Net(nn.Module):
    def __init__(self, tail=None):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.upstream = Spot()
        self.conv = LayerWithSpot(4, 6, 3)
        self.tail = tail if tail is not None else nn.SiLU()
        self.downstream = Spot()
        self.head = nn.Linear(6, 4)
        randomise_statistics(self)

    def forward(self, x):
        x = self.upstream(self.norm(self.stem(x)).relu())
        return self.head(self.downstream(self.tail(self.conv(x))).mean((2, 3)))


class WritesInput(Net):
    def forward(self, x):
        x.mul_(2).add_(1)
        return super().forward(x)


class WritesBuffers(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        self.hidden.data.copy_(torch.ones(3))
        # Statistics of the batch although the module is in evaluation mode.
        torch.nn.functional.batch_norm(x, self.mean.clone(), self.mean.abs().clone(), training=True)
        torch.nn.functional.batch_norm(self.stem(x), self.norm.running_mean, self.norm.running_var, training=True)
        return super().forward(x)


class WritesWeights(Net):
    def forward(self, x):
        with torch.no_grad():
            self.stem.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class DrawsNumbers(Net):
    def forward(self, x):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return super().forward(x) + 0 * noise


def plain():
    return Net().eval()


def train_mode():
    return Net().train()


def mixed_flags():
    net = Net().train()
    net.norm.eval()
    net.tail.training = False
    return net


def dropout_and_norm():
    return Net(nn.Sequential(nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.3))).train()


def with_hooks():
    net = Net()
    handles = []
    for module in net.modules():
        handles.append(module.register_forward_hook(lambda module, args, out: None))
        handles.append(module.register_forward_pre_hook(lambda module, args: None))
    handles.append(net.stem.register_forward_hook(lambda module, args, kwargs, out: None, with_kwargs=True))
    handles[3].remove()
    return net


def with_backward_hooks():
    net = Net()
    for module in net.modules():
        module.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return net


def with_gradients():
    net = Net()
    cross_entropy(net(torch.randn(4, 2, 6, 6)), torch.tensor([0, 1, 2, 3])).backward()
    return net


def partly_frozen():
    net = Net()
    net.conv.requires_grad_(False)
    net.stem.requires_grad_(False)
    return net


def tied_parameter():
    net = Net()
    net.bias_of_the_stem = net.stem.bias
    return net


def module_with_two_names():
    net = Net()
    net.classifier = net.head
    net.backbone = nn.Sequential(net.stem, net.norm)
    return net


def compiled_part():
    net = Net()
    net.tail = torch.compile(nn.Sequential(nn.BatchNorm2d(6), nn.SiLU()), backend="eager")
    return net


def compiled_and_used():
    net = compiled_part()
    net(torch.randn(2, 2, 6, 6))
    return net


def compiled_by_aot():
    net = Net()
    net.tail = torch.compile(nn.SiLU(), backend="aot_eager")
    return net


MODELS = (
    plain,
    train_mode,
    mixed_flags,
    dropout_and_norm,
    with_hooks,
    with_backward_hooks,
    with_gradients,
    partly_frozen,
    tied_parameter,
    module_with_two_names,
    WritesInput,
    WritesBuffers,
    WritesWeights,
    DrawsNumbers,
    compiled_part,
    compiled_and_used,
    compiled_by_aot,
)


def fail(x):
    raise UserError("in the forward")


# In a measurement the model is called to see what runs, then to observe, then to certify.
def nothing_happens(net):
    return None


def upstream_fails(net):
    net.upstream.action = fail
    return UserError


def layer_fails(net):
    net.conv.spot.action = fail
    return UserError


def layer_fails_when_observed(net):
    net.conv.spot.action, net.conv.spot.on_call = fail, 2
    return UserError


def tail_fails(net):
    net.downstream.action = fail
    return UserError


def tail_fails_when_observed(net):
    net.downstream.action, net.downstream.on_call = fail, 2
    return UserError


def tail_fails_when_certified(net):
    net.downstream.action, net.downstream.on_call = fail, 3
    return UserError


def certificate_refuses(net):
    net.downstream.action = lambda x: x - x.mean(0, keepdim=True)
    return lf.LayerSelectionError


def data_are_refused(net):
    net.downstream.action = lambda x: x * torch.nan
    return lf.BatchError


EVENTS = (
    nothing_happens,
    upstream_fails,
    layer_fails,
    layer_fails_when_observed,
    tail_fails,
    tail_fails_when_observed,
    tail_fails_when_certified,
    certificate_refuses,
    data_are_refused,
)


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def snapshot(net, batch):
    """Copies of all that a user can see; ``same`` objects are compared by identity."""
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    state = {
        "parameters": copies(parameters),
        "gradients": copies({name: p.grad for name, p in parameters.items()}),
        "buffers": copies(buffers),
        "batch": copies(dict(enumerate(batch))),
        "random states": [torch.get_rng_state(), *map(torch.as_tensor, random.getstate()[1:2])],
    }
    facts = {
        "identities": {name: id(t) for name, t in [*parameters.items(), *buffers.items()]},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "versions": {name: t._version for name, t in [*parameters.items(), *buffers.items()]},
        "batch versions": [t._version for t in batch],
        "training": {name: module.training for name, module in net.named_modules()},
        "hooks": {name: {kind: len(getattr(m, kind)) for kind in HOOKS} for name, m in net.named_modules()},
        "attributes": {name: list(vars(module)) for name, module in net.named_modules()},
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        "modes": modes(),
    }
    return state, facts


def copies(tensors):
    return {name: None if t is None else t.detach().clone() for name, t in tensors.items()}


def modes():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "default dtype": torch.get_default_dtype(),
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
        "anomaly": torch.is_anomaly_enabled(),
    }


def assert_unchanged(net, batch, before):
    state, facts = snapshot(net, batch)
    assert facts == before[1]
    assert_close(state, before[0], rtol=0, atol=0)


@pytest.fixture
def batch():
    return torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_everything_is_as_it_was(model, event, batch):
    torch.compiler.reset()
    net = model()
    error = event(net)
    before = snapshot(net, batch)
    if error is None:
        assert lf.measure_flatness(net, [batch, batch]).num_samples == 10
    else:
        with pytest.raises(error):
            lf.measure_flatness(net, [batch, batch], layers="conv")
    assert_unchanged(net, batch, before)


@pytest.mark.parametrize("event", [nothing_happens, tail_fails_when_observed, certificate_refuses])
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_are_as_they_were(mode, event, batch):
    net = Net()
    error = event(net)
    with mode():
        before = snapshot(net, batch)
        if error is None:
            lf.measure_flatness(net, [batch])
        else:
            with pytest.raises(error):
                lf.measure_flatness(net, [batch])
        assert_unchanged(net, batch, before)


@pytest.mark.parametrize("change", ["weight", "gradient", "buffer", "flag", "hook", "attribute", "random", "batch"])
def test_a_trace_would_be_seen(change, batch):
    net = with_gradients()
    before = snapshot(net, batch)
    assert_unchanged(net, batch, before)
    if change == "weight":
        net.stem.weight.data[0, 0] += 1e-6
    elif change == "gradient":
        net.head.bias.grad[0] += 1e-6
    elif change == "buffer":
        net.norm.num_batches_tracked += 1
    elif change == "flag":
        net.tail.eval()
    elif change == "hook":
        net.conv.register_forward_hook(lambda *args: None)
    elif change == "attribute":
        net.conv.extra = 1
    elif change == "random":
        random.random()
    else:
        batch[0][0] += 1
    with pytest.raises(AssertionError):
        assert_unchanged(net, batch, before)


# ------------------------------------------------------------------------------------------------------- same numbers


def block_traces(net, batch):
    (layer,) = lf.measure_flatness(net, [batch]).layers.values()
    return layer.block_traces


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
    ids=["no_grad", "inference_mode", "autocast", "anomaly"],
)
@pytest.mark.parametrize("model", [plain, dropout_and_norm, WritesInput, compiled_part], ids=lambda m: m.__name__)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_numbers_do_not_depend_on_the_mode_around(mode, model, batch):
    net = model()
    expected = block_traces(net, batch)
    with mode():
        assert_close(block_traces(net, tuple(part.clone() for part in batch)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_batches_made_in_a_mode_are_measured_outside(mode, batch):
    net = Net()
    with mode():
        made = tuple(part.clone() for part in batch)
    assert_close(block_traces(net, made), block_traces(net, batch), rtol=0, atol=0)


def test_a_network_made_in_inference_mode_is_measured(batch):
    torch.manual_seed(0)
    expected = block_traces(Net(), batch)
    torch.manual_seed(0)
    with torch.inference_mode():
        net = Net()
        inside = block_traces(net, batch)
    assert_close(inside, expected, rtol=0, atol=0)
    assert_close(block_traces(net, batch), expected, rtol=0, atol=0)


def test_an_observer_of_inference_mode_goes_on_outside(batch):
    net = Net()
    observer, metric = lf.FlatnessObserver(net), lf.FlatnessMetric(num_filters=6)
    with torch.inference_mode():
        metric.update(*observer(*batch)["conv"])
    metric.update(*observer(*batch)["conv"])
    assert_close(metric.means()[0], block_traces(net, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("model", [train_mode, mixed_flags, WritesBuffers, DrawsNumbers], ids=lambda m: m.__name__)
def test_a_second_measurement_gives_the_same(model, batch):
    net = model()
    assert_close(block_traces(net, batch), block_traces(net, batch), rtol=0, atol=0)


class CountsItsCalls(Net):
    """Its logits depend on a buffer that every call changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.calls * super().forward(x)


def test_every_call_begins_with_the_same_buffers(batch):
    net = CountsItsCalls()
    assert_close(block_traces(net, batch), block_traces(net, batch), rtol=0, atol=0)
    assert net.calls == 1


# ---------------------------------------------------------------------------------------- in the middle of other things


@pytest.mark.parametrize(
    "model",
    [plain, train_mode, with_hooks, tied_parameter, module_with_two_names, compiled_by_aot],
    ids=lambda m: m.__name__,
)
@pytest.mark.parametrize("event", [nothing_happens, tail_fails_when_observed], ids=lambda event: event.__name__)
def test_between_forward_and_backward(model, event, batch):
    torch.compiler.reset()
    net = model()
    twin = copy.deepcopy(net)
    x, y = batch
    cross_entropy(twin(x), y).backward()

    loss = cross_entropy(net(x), y)
    error = event(net)
    net.downstream.calls = 0
    if error is None:
        lf.measure_flatness(net, [batch])
    else:
        with pytest.raises(error):
            lf.measure_flatness(net, [batch])
    loss.backward()
    for (name, found), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_close(found.grad, expected.grad, rtol=0, atol=0, msg=name)


def test_on_values_of_a_users_graph(batch):
    encoder, net = nn.Conv2d(2, 2, 1), Net()
    x, y = batch
    cross_entropy(net(encoder(x)), y).backward()
    expected = encoder.weight.grad.clone()
    encoder.zero_grad()

    encoded = encoder(x)
    loss = cross_entropy(net(encoded), y)
    traces = block_traces(net, (encoded, y))
    assert not traces.requires_grad
    assert encoder.weight.grad is None
    loss.backward()
    assert_close(encoder.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_results_hold_no_graph(batch):
    (layer,) = lf.measure_flatness(Net(), [batch]).layers.values()
    assert not any(t.requires_grad for t in (layer.block_traces, layer.filter_traces, layer.filter_flatness))


def test_backward_hooks_of_the_user_are_not_run(batch):
    net = Net()
    seen = []
    net.tail.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(module))
    block_traces(net, batch)
    assert seen == []


@pytest.mark.parametrize("shuffle", [True, False])
def test_reading_a_loader_draws_nothing(shuffle, batch):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=2, shuffle=shuffle)
    net = Net()
    before = snapshot(net, batch)
    lf.measure_flatness(net, loader)
    assert_unchanged(net, batch, before)


@pytest.mark.parametrize("model", [dropout_and_norm, module_with_two_names], ids=lambda m: m.__name__)
def test_training_goes_on_as_without_a_measurement(model, batch):
    def train(net, measured):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
            if measured:
                block_traces(net, batch)
        return net.state_dict()

    net = model()
    torch.manual_seed(1)
    expected = train(copy.deepcopy(net), measured=False)
    torch.manual_seed(1)
    assert_close(train(net, measured=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_compiled_code_is_not_run_and_not_lost(whole, batch):
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    net = Net().eval()
    expected, outputs = block_traces(net, batch), net(batch[0])
    if whole:
        net = torch.compile(net, backend=backend)
    else:
        net.tail = torch.compile(net.tail, backend=backend)
    assert_close(block_traces(net, batch), expected, rtol=0, atol=0)
    assert compiled == []
    assert_close(net(batch[0]), outputs)
    assert len(compiled) > 0


def test_what_a_forward_draws_is_drawn_again_afterwards(batch):
    net = DrawsNumbers()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    lf.measure_flatness(net, [batch])
    assert (torch.rand(()), np.random.rand(), random.random()) == expected  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_observing_puts_the_grad_mode_back(fails, batch):
    net = Net()
    if fails:
        tail_fails(net)
    with torch.no_grad():
        try:
            with Observation({"conv": net.conv}, net.head):
                net(batch[0])
        except UserError:
            assert fails
        assert not torch.is_grad_enabled()


def test_float32_is_float32():
    """Whatever ``torch.set_float32_matmul_precision`` was told; without fast bfloat16 only the setting shows it."""
    seen = []

    class Looks(nn.Sequential):
        def forward(self, x):
            seen.append(settings())
            return super().forward(x)

    def settings():
        backends = torch.backends
        owners = [backends.cudnn]
        if hasattr(backends.cuda.matmul, "fp32_precision"):
            owners = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv, backends.cudnn.conv]
        name = "fp32_precision" if len(owners) > 1 else "allow_tf32"
        return [torch.get_float32_matmul_precision(), *(getattr(owner, name) for owner in owners)]

    model = Looks(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    torch.set_float32_matmul_precision("medium")
    try:
        before = settings()
        lf.measure_flatness(model, [torch.randn(4, 1, 8, 8)])
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {tuple(found[1:]) for found in seen} <= {("ieee",) * 4, (False,)}
