"""Copies of a model: every call begins with the same tensors, in the precision and on the device to measure in."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.model.copy import ModelCopy, measured, measuring_device
from lightning_flatness.model.isolation import isolated
from tests.eventful_networks import (
    CountsItsCalls,
    DrawsNumbers,
    Net,
    WritesBuffers,
    block_traces,
    mixed_flags,
    train_mode,
)
from tests.guarding import guards


@pytest.mark.parametrize("model", [train_mode, mixed_flags, WritesBuffers, DrawsNumbers], ids=lambda m: m.__name__)
def test_a_second_measurement_gives_the_same(model, batch):
    net = model()
    assert_close(block_traces(net, batch), block_traces(net, batch), rtol=0, atol=0)


@guards("model/copy.py", "tensors |= {key: tensors[key].clone() for key in begun}", "pass")
def test_every_call_begins_with_the_same_buffers(batch):
    net = CountsItsCalls()
    assert_close(block_traces(net, batch), block_traces(net, batch), rtol=0, atol=0)
    assert net.calls == 1


class HalfForPairs(nn.Linear):
    """Enables autocast for a batch of two samples."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=len(x) == 2):
            return super().forward(x)


@guards("model/copy.py", "self._full_precision.was_needed = False", "pass")
def test_autocast_in_one_call_is_not_told_of_the_next():
    copy = ModelCopy(HalfForPairs(3, 2))
    told = []
    for samples in (1, 2, 1):
        assert copy(torch.ones(samples, 3)).dtype == torch.float32
        told.append(copy.enables_autocast)
    assert told == [False, True, False]


def by_method(layer):
    layer.requires_grad_(False)


def by_attribute(layer):
    for parameter in layer.parameters():
        parameter.requires_grad = False


class FreezesInForward(nn.Module):
    """Freezes its features in every forward, as fine-tuning code may do."""

    def __init__(self, freeze):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh())
        self.head, self.freeze = nn.Linear(5, 4), freeze

    def forward(self, x):
        self.freeze(self.features)
        return self.head(self.features(x).mean((2, 3)))


FROZEN = {
    "flatness": lambda net, *args: lf.measure_flatness(net, *args, layers="all").hessian_trace,
    "lambda_max": lambda net, *args: lf.measure_lambda_max(net, *args)["features.2"].filter_lambda_max,
    "spectrum": lambda net, *args: lf.hessian_spectrum(net, *args, num_steps=3, num_probes=1).eigenvalues,
    "landscape": lambda net, *args: lf.loss_landscape(net, *args, steps=3).losses,
}


@guards("model/copy.py", "if not wanted:", "if False:", ids="flatness-by_method")
@pytest.mark.parametrize("freeze", [by_method, by_attribute])
@pytest.mark.parametrize("measure", FROZEN)
def test_weights_that_the_forward_freezes_are_measured_and_stay_as_they_are(measure, freeze, batch):
    net, plain = FreezesInForward(freeze), FreezesInForward(lambda layer: None)
    plain.load_state_dict(net.state_dict())
    assert_close(FROZEN[measure](net, [batch]), FROZEN[measure](plain, [batch]), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in net.parameters())


@guards("model/copy.py", "if not wanted:", "if True:")
def test_a_forward_may_take_gradients_of_weights_of_its_own():
    class Sharp(nn.Linear):
        def forward(self, x):
            self.weight.requires_grad_(True)
            with torch.enable_grad():
                self.slope = torch.autograd.grad(super().forward(x.detach()).sum(), self.weight)[0]
            return super().forward(x)

    assert ModelCopy(Sharp(3, 2))(torch.ones(4, 3)).shape == (4, 2)


def test_inputs_may_be_made_to_require_gradients():
    class Energy(nn.Linear):
        def forward(self, x):
            return torch.autograd.grad(super().forward(x.requires_grad_()).sum(), x, create_graph=True)[0]

    assert ModelCopy(Energy(3, 2))(torch.ones(4, 3)).shape == (4, 3)


def test_tensors_that_are_no_numbers_keep_their_type():
    index = torch.tensor([1, 2])
    assert measured(index, torch.float64).dtype == torch.int64
    assert measured(torch.tensor([1j]), torch.float64).dtype == torch.complex64


def test_a_device_without_float64_is_left_for_another(monkeypatch, batch):
    """The meta device stands for the one that is moved to, since it holds no numbers that could be computed here."""
    monkeypatch.setattr("lightning_flatness.model.copy.measuring_device", lambda device: torch.device("meta"))
    net = Net().eval()
    with isolated(net):
        assert ModelCopy(net)(batch[0]).device.type == "meta"
    assert net.head.weight.device.type == "cpu"


@guards("model.copy:measuring_device", body="return device")
def test_devices_without_float64_are_known():
    assert measuring_device(torch.device("mps")) == torch.device("cpu")
    assert measuring_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_weights_without_numbers_are_named(batch):
    net = Net()
    net.head.to("meta")
    for measure in MEASURE:
        with pytest.raises(lf.FlatnessError, match="'head.weight' is on the meta device.*Load"):
            measure(net, [batch])


class Wrapped(nn.Module):
    """Passes all arguments on, so that its signature does not show what does not fit."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *arguments, **keywords):
        return self.network(*arguments, **keywords)


MEASURE = [lf.measure_flatness, lf.measure_lambda_max, lf.hessian_spectrum, lf.loss_landscape]


@pytest.mark.parametrize("measure", MEASURE, ids=lambda f: f.__name__)
def test_inputs_that_the_forward_does_not_take(measure):
    net, x, y = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)),
        torch.randn(4, 2, 6, 6),
        torch.arange(4) % 3,
    )
    for inputs, number in (((x, x.flip(3)), 2), (list(x), 4), ({"image": x}, 0)):
        with pytest.raises(
            lf.FlatnessError, match=rf"forward\(input.*\) does not take.*here {number}.*batch_fn=.*model="
        ):
            measure(net, [(inputs, y)])
        with pytest.raises(lf.BatchError, match=r"fails on the batch's inputs \(TypeError: .*forward\(\).*batch_fn="):
            measure(Wrapped(net), [(inputs, y)])
    for network in (net, Wrapped(net)):
        with pytest.raises(lf.BatchError, match="fails on the batch's inputs .TypeError.*numpy.ndarray.*batch_fn="):
            measure(network, [(x.numpy(), y)])
    with pytest.raises(lf.FlatnessError, match="type torch.uint8.*float.* / 255.*batch_fn="):
        measure(net, [((x > 0).byte(), y)])
    with pytest.raises(lf.BatchError) as caught:
        measure(net, [(x + 0j, y)])
    assert "255" not in str(caught.value)


WRONG = {
    "channels": (lambda x: x[:, :1], r"\(4, 1, 6, 6\) and type torch.float32 \(.*channels.*\)"),
    "size": (lambda x: x[:, :, :2, :2], r"\(4, 2, 2, 2\) and type torch.float32 \(.*Kernel size.*\)"),
    "type": (lambda x: x.double(), r"\(4, 2, 6, 6\) and type torch.float64 \(.*\). Convert them.*inputs.float\(\)"),
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("measure", MEASURE, ids=lambda f: f.__name__)
def test_inputs_that_the_forward_fails_on(measure, change):
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)), torch.randn(4, 2, 6, 6)
    wrong, says = WRONG[change]
    with pytest.raises(lf.BatchError, match=f"forward fails on inputs of shape {says}") as caught:
        measure(net, [(wrong(x), torch.arange(4) % 3)])
    assert isinstance(caught.value.__cause__, RuntimeError)


def unpacked(batch):
    images, _ = batch
    return images


TAKES = {
    "a pair": unpacked,
    "a dictionary": lambda batch: batch["image"],
    "a dictionary or a tensor": lambda batch: "image" in batch and batch["image"],
    "an object": lambda batch: batch.image,
}


@pytest.mark.parametrize("takes", TAKES)
def test_a_forward_that_takes_the_whole_batch(takes):
    class Taking(nn.Conv2d):
        def forward(self, batch):
            return super().forward(TAKES[takes](batch)).mean((2, 3))

    with pytest.raises(lf.BatchError, match="forward fails on the batch's inputs .*batch_fn=.*model="):
        lf.measure_flatness(Taking(2, 3, 3), [(torch.randn(4, 2, 6, 6), torch.arange(4) % 3)])


def test_a_module_without_forward_is_refused():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 3)

    with pytest.raises(lf.BatchError, match="forward fails on the batch's inputs .*model="):
        lf.measure_flatness(Holds(), [(torch.randn(4, 2), torch.arange(4) % 3)])


def test_errors_of_the_forward_itself_stay():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x):
            return self.conv(x) + "one"

    for network in (Broken(), Wrapped(Broken())):
        with pytest.raises(TypeError, match="operand|concatenate|one"):
            lf.measure_flatness(network, [(torch.randn(4, 2, 6, 6), torch.arange(4) % 3)])
