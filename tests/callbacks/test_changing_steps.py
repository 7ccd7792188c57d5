"""Validation steps that change the network for the time of its call: no pass of our own runs the same network."""

from contextlib import contextmanager

import pytest
import torch
from torch.func import functional_call

import lightning_flatness as lf
from tests.callbacks import live_networks as networks
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.callbacks.live_runs import Module
from tests.guarding import guards


@contextmanager
def averaged(network, factor=1.5, names=None):
    """Other weights inside the block, past autograd's counters."""
    weights = [parameter.data for name, parameter in network.named_parameters() if names is None or name in names]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(factor)
    yield
    for weight, old in zip(weights, before, strict=True):
        weight.copy_(old)


class Averages(Module):
    names, factor, begins = None, 1.5, 0

    def step(self, x):
        if self.current_epoch < self.begins:
            return self(x)
        with averaged(self.net, self.factor, self.names):
            return self(x)


class AveragesLittle(Averages):
    """Less than the logits show."""

    factor = 1 + 1e-12


class AveragesLayer(Averages):
    names = ("conv.weight",)


class AveragesOthers(Averages):
    names = ("norm.weight", "norm.bias")


class AveragesClassifier(Averages):
    names = ("fc.weight",)


class CallsWithAverages(Module):
    def step(self, x):
        weights = {name: 1.5 * parameter for name, parameter in self.net.named_parameters()}
        return functional_call(self.net, weights, (x,))


class PutsAveragesIn(Module):
    def step(self, x):
        kept = {parameter: parameter.data for parameter in self.net.parameters()}
        for parameter in kept:
            parameter.data = 1.5 * parameter.data
        logits = self(x)
        for parameter, data in kept.items():
            parameter.data = data
        return logits


class HeatsUp(Module):
    def step(self, x):
        handle = self.net.fc.register_forward_hook(lambda module, arguments, output: 3 * output)
        logits = self(x)
        handle.remove()
        return logits


class TrainsDropout(Module):
    """Dropout stays on in validation, for the uncertainty."""

    def step(self, x):
        self.net.dropout.train()
        logits = self(x)
        self.net.dropout.eval()
        return logits


WEIGHTS = "with other weights than it has after the step.*on_validation_start.*model="
LOGITS = "returns other logits within the validation step.*random.*on_validation_start"
STEPS = {
    Averages: WEIGHTS,
    AveragesLittle: WEIGHTS,
    AveragesLayer: WEIGHTS,
    AveragesOthers: WEIGHTS,
    AveragesClassifier: WEIGHTS,
    CallsWithAverages: WEIGHTS,
    PutsAveragesIn: WEIGHTS,
    HeatsUp: LOGITS,
    TrainsDropout: LOGITS,
}


def validate(folder, module, callback, batches=None):
    quiet_trainer(folder, callback).validate(module, batches or loaders(dtype=torch.float64)[1], verbose=False)


@guards("model.answer:certify_weights", returns=None, ids="AveragesLittle-True")
@guards(
    "layers/passes.py",
    "part.answer.certify_logits(logits[:rows].detach(), start, in_half=recorded.enables_autocast)",
    "pass",
    ids="HeatsUp-False",
)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_that_changes_the_network_is_refused(tmp_path, step, live):
    network = networks.Dropouts() if step is TrainsDropout else networks.Plain()
    with pytest.raises(lf.BatchError, match=STEPS[step]):
        validate(tmp_path, step(network), lf.FlatnessCallback(live=live))


class Centred(networks.Plain):
    """Subtracts the mean of all samples of the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


@guards("model/answer.py", "if apart else", "if False else")
@pytest.mark.parametrize("live", [True, False])
def test_samples_that_depend_on_others_are_the_first_cause_to_look_for(tmp_path, live):
    told = r"other logits .*ran on 8 samples at once, and here on 5. If its logits depend.*no max_samples=.*random"
    with pytest.raises(lf.BatchError, match=told):
        validate(tmp_path, Module(Centred()), lf.FlatnessCallback(live=live, max_samples=12))


class MovingAverage(networks.Plain):
    """Divides by an average that every call moves, as the observers of fake quantization do."""

    def __init__(self, matters=True):
        super().__init__()
        self.matters = matters
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def tail(self, z, upstream):
        self.scale.mul_(0.9).add_(z.detach().abs().max(), alpha=0.1)
        return super().tail(z / self.scale if self.matters else z, upstream)


@pytest.mark.parametrize("live", [True, False])
def test_buffers_that_every_call_changes_are_named(tmp_path, live):
    with pytest.raises(lf.BatchError, match=r"changes buffers in evaluation mode \('net.scale'\).*disable_observer"):
        validate(tmp_path, Module(MovingAverage()), lf.FlatnessCallback(live=live))


def test_buffers_that_do_not_matter_are_not_named(tmp_path):
    with pytest.raises(lf.BatchError, match=LOGITS):
        validate(tmp_path, HeatsUp(MovingAverage(matters=False)), lf.FlatnessCallback())


def test_it_is_refused_before_training(tmp_path):
    module = Averages(networks.Plain())
    train, val = loaders(dtype=torch.float64)
    with pytest.raises(lf.BatchError, match=WEIGHTS):
        quiet_trainer(tmp_path, lf.FlatnessCallback(summary=False)).fit(module, train, val)
    assert module.training_steps == 0


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("step", [Averages, AveragesLittle, AveragesLayer], ids=lambda step: step.__name__)
def test_steps_that_change_the_network_from_a_later_epoch_on(tmp_path, step, live):
    module, callback = step(networks.Plain()), lf.FlatnessCallback(summary=False, live=live)
    module.begins = 1
    with pytest.raises(lf.BatchError, match=WEIGHTS):
        quiet_trainer(tmp_path, callback).fit(module, *loaders(dtype=torch.float64))
    assert len(callback.history) == 1


class FromBatch(Averages):
    """Only the second batch is validated with averages."""

    def validation_step(self, batch, batch_idx):
        self.names = None if batch_idx == 1 else ()
        super().validation_step(batch, batch_idx)


@guards("layers.recording:kernel_sample", returns=None, ids="observed")
@guards("callbacks/running.py", "raise BatchError(OTHER_WEIGHTS) from error", "return True", ids="observed")
@pytest.mark.parametrize(("live", "says"), [(True, WEIGHTS), (False, LOGITS)], ids=["observed", "own"])
def test_a_later_step_that_changes_the_network(tmp_path, live, says):
    with pytest.raises(lf.BatchError, match=says):
        validate(tmp_path, FromBatch(networks.Plain()), lf.FlatnessCallback(live=live))


@guards("layers/passes.py", "chosen = chosen._replace(answer=chosen.answer.chosen(mask))", "pass")
def test_a_loader_of_which_parts_are_measured(tmp_path):
    """The rows of the logits are those of the measured samples."""
    callback = lf.FlatnessCallback(max_samples=9)
    validate(tmp_path, Classifier(), callback, loaders()[1])
    assert callback.report.num_samples == 9
    with pytest.raises(lf.BatchError, match=LOGITS):
        validate(tmp_path, HeatsUp(networks.Plain()), lf.FlatnessCallback(max_samples=9))


def test_weights_changed_for_training_data_are_refused(tmp_path):
    with pytest.raises(lf.BatchError, match=WEIGHTS):
        quiet_trainer(tmp_path, lf.FlatnessCallback(data="train", summary=False)).fit(
            Averages(networks.Plain()), *loaders(dtype=torch.float64)
        )


class EntersAutocast(networks.Plain):
    """Runs in bfloat16 by itself, and returns float32."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.float()).float()


class BoundsItsWeights(networks.Plain):
    """Bounds the norm of every filter, as in EEGNet."""

    def forward(self, x):
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.1)
        return super().forward(x)


@guards("layers/passes.py", ", in_half=recorded.enables_autocast", "", ids="EntersAutocast-False")
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("network", [EntersAutocast, BoundsItsWeights])
def test_networks_that_change_precision_or_weights_in_their_forward_are_measured(tmp_path, network, live):
    callback = lf.FlatnessCallback(live=live)
    dtype = torch.float32 if network is EntersAutocast else torch.float64
    module = Module(network().to(dtype))
    quiet_trainer(tmp_path, callback).validate(module, loaders(dtype=dtype)[1], verbose=False)
    assert callback.report is not None


class Odd(dict):
    """A mapping that only its own arguments make."""

    def __init__(self, *, logits):
        super().__init__(logits=logits)


class ReturnsOdd(networks.Plain):
    def forward(self, x):
        return Odd(logits=super().forward(x))


class TakesLogits(Module):
    def step(self, x):
        return self(x)["logits"]


@pytest.mark.parametrize("live", [True, False])
def test_what_a_network_returns_may_be_of_any_type(tmp_path, live):
    """Where it cannot be measured, only a warning says so."""
    validate(tmp_path, TakesLogits(ReturnsOdd()), lf.FlatnessCallback(live=live, on_error="warn"))
