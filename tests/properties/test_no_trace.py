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
from tests.eventful_networks import (
    EVENTS,
    MODELS,
    Net,
    arrange,
    block_traces,
    compiled_by_aot,
    dropout_and_norm,
    module_with_two_names,
    plain,
    tied_parameter,
    train_mode,
    with_gradients,
    with_hooks,
)
from tests.guarding import guards

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


@guards("layers/tracing.py", "handle.remove()", "pass", ids="plain-tail_fails")
@guards("layers/recording.py", "self._open.enter", "ExitStack().enter", ids="plain-tail_fails_when_observed")
@guards("layers/recording.py", "self._open.callback(handle.remove)", "pass", ids="plain-tail_fails_when_observed")
@guards("model/copy.py", "tie_weights=False", "tie_weights=True", ids="module_with_two_names-nothing_happens")
@guards(
    "model/copy.py", "measured(tensor, self._dtype_of(tensor)).clone()", "tensor", ids="WritesInput-nothing_happens"
)
@guards(
    "model/copy.py",
    "tensor.detach(), self._dtype_of(tensor)).clone()",
    "tensor.detach(), self._dtype_of(tensor))",
    ids="WritesWeights-nothing_happens",
)
@guards("model/attributes.py", "now.update(attributes)", "pass", ids="train_mode-nothing_happens")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_everything_is_as_it_was(model, event, batch):
    torch.compiler.reset()
    net = model()
    error = arrange(net, event)
    before = snapshot(net, batch)
    if error is None:
        assert lf.measure_flatness(net, [batch, batch]).num_samples == 10
    else:
        with pytest.raises(error):
            lf.measure_flatness(net, [batch, batch], layers="conv")
    assert_unchanged(net, batch, before)


@pytest.mark.parametrize("event", ["nothing_happens", "tail_fails_when_observed", "certificate_refuses"])
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes_are_as_they_were(mode, event, batch):
    net = Net()
    error = arrange(net, event)
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


@pytest.mark.parametrize(
    "model",
    [plain, train_mode, with_hooks, tied_parameter, module_with_two_names, compiled_by_aot],
    ids=lambda m: m.__name__,
)
@pytest.mark.parametrize("event", ["nothing_happens", "tail_fails_when_observed"])
def test_between_forward_and_backward(model, event, batch):
    torch.compiler.reset()
    net = model()
    twin = copy.deepcopy(net)
    x, y = batch
    cross_entropy(twin(x), y).backward()

    loss = cross_entropy(net(x), y)
    error = arrange(net, event)
    net.downstream.calls = 0
    if error is None:
        lf.measure_flatness(net, [batch])
    else:
        with pytest.raises(error):
            lf.measure_flatness(net, [batch])
    loss.backward()
    for (name, actual), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, rtol=0, atol=0, msg=name)


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


@guards("measure/batches.py", "with random_states_kept(model), generators_kept", "with generators_kept")
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
