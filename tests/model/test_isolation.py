"""A measurement computes the same whatever modes it runs in, and draws and compiles nothing of the user's."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.model import isolation
from tests.eventful_networks import DrawsNumbers, Net, WritesInput, block_traces, compiled_part, dropout_and_norm, plain
from tests.guarding import guards


@guards("model/isolation.py", "stack.enter_context(torch.inference_mode(False))", "pass", ids="plain-inference_mode")
@guards("model.isolation:differentiable", body="yield", ids="plain-no_grad")
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


@guards("model/isolation.py", 'torch.compiler.set_stance("force_eager")', "ExitStack()", ids="part")
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


@pytest.mark.parametrize("part", ["random_states_kept", "_evaluation_mode", "only_heard_by"])
def test_what_fails_before_a_pass_leaves_compiled_code_compiled(monkeypatch, part):
    @contextmanager
    def failing(*arguments):
        raise ValueError("no")
        yield

    monkeypatch.setattr(isolation, part, failing)
    with pytest.raises(ValueError, match="no"), isolation.untouched(plain()):
        pass
    assert torch._dynamo.eval_frame._stance.stance == "default"


@guards("model/isolation.py", "if vars(module).get(name)", "if False")
def test_backward_hooks_of_the_user_are_not_run(batch):
    net = Net()
    calls = []
    net.tail.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(module))
    block_traces(net, batch)
    assert calls == []


@guards("model/isolation.py", "torch.random.fork_rng(alike, device_type=device_type)", "ExitStack()")
@guards("model/isolation.py", "numpy.random.set_state(numpy_state)", "pass")
@guards("model/isolation.py", "random.setstate(python_state)", "pass")
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


def float32_settings():
    backends = torch.backends
    owners, name = [backends.cudnn], "allow_tf32"
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        owners = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv, backends.cudnn.conv]
        name = "fp32_precision"
    return [torch.get_float32_matmul_precision(), *(getattr(owner, name) for owner in owners)]


@guards("model/isolation.py", 'owner.fp32_precision = "ieee"', "pass")
@guards("model/isolation.py", "owner.fp32_precision = value", "pass")
def test_float32_is_float32():
    """Whatever ``torch.set_float32_matmul_precision`` was told; without fast bfloat16 only the setting shows it."""
    settings_inside = []

    class NotesSettings(nn.Sequential):
        def forward(self, x):
            settings_inside.append(float32_settings())
            return super().forward(x)

    model = NotesSettings(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    torch.set_float32_matmul_precision("medium")
    try:
        before = float32_settings()
        lf.measure_flatness(model, [torch.randn(4, 1, 8, 8)])
        assert float32_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {tuple(of_owners) for _, *of_owners in settings_inside} <= {("ieee",) * 4, (False,)}
