"""Validation under autocast, and with weights in half precision, is observed and is the same validation."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from lightning_flatness.measure.measurement import Measurement
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, global_modes, module_state, random_states
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer
from tests.callbacks.live_runs import OBSERVES, OWN, Module
from tests.callbacks.training_runs import end_of_training, seed_everything
from tests.guarding import guards

NAMES = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "bfloat16",  # on a CPU, Lightning takes bf16-mixed in its place
    "16-true": "float16",
    "32-true": "float32",
    "64-true": "float64",
}


def run(folder, precision, does, *callbacks, make=Module, net=networks.Plain):
    """A run, and everything that it leaves behind."""
    seed_everything()
    module, data = make(net().float()), loaders(dtype=torch.float64 if precision == "64-true" else torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `Trainer")
        trainer = quiet_trainer(folder, *callbacks, precision=precision, max_epochs=2)
    if does == "fit":
        trainer.fit(module, *data)
    else:
        trainer.validate(module, data[1], verbose=False)
    left = {"noted": module.noted, "random": random_states(), "modes": global_modes()} | module_state(module)
    return left | ({"end": end_of_training(trainer, module)} if does == "fit" else {})


@pytest.mark.parametrize("does", ["fit", "validate"])
@pytest.mark.parametrize("precision", NAMES)
def test_runs_are_the_same_and_observed(tmp_path, told, precision, does):
    callback = lf.FlatnessCallback(summary=False)
    assert_same(run(tmp_path, precision, does, callback), run(tmp_path, precision, does))
    assert len(told) == 1
    assert OBSERVES in told[0]
    assert callback.report.precision == NAMES[precision]
    assert (callback.report.precision_deviation != 0) == (NAMES[precision] not in ("float32", "float64"))
    assert callback.report.exact


@guards(
    "callbacks/data/sources.py", "with trainer.precision_plugin.val_step_context():", "if True:", ids="0-bf16-mixed"
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_summary_says_what_half_precision_changes(tmp_path, told, capsys, num_sanity_val_steps, precision):
    callback = lf.FlatnessCallback()
    seed_everything()
    trainer = quiet_trainer(
        tmp_path, callback, precision=precision, max_epochs=1, num_sanity_val_steps=num_sanity_val_steps
    )
    trainer.fit(Module(networks.Plain().float()), *loaders())
    text = " ".join(capsys.readouterr().out.split())
    assert "Features are bfloat16, as in the network's own forward pass; on a few samples the trace differs by" in text
    assert "Features are bfloat16" in " ".join(str(callback.report).split())


@guards("layers/trial.py", "if dtype is not None and precision is not None and precision.autocast:", "if False:")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_precision_that_is_asked_for_is_that_of_copies(tmp_path, told, precision):
    callback = lf.FlatnessCallback(dtype="float32", summary=False)
    assert_same(run(tmp_path, precision, "validate", callback), run(tmp_path, precision, "validate"))
    assert OWN in told[0]
    assert "torch.float32" in told[0]
    assert callback.report.precision == "float32"


class SwitchesItselfToHalf(nn.Module):
    """Autocast in the forward of the network, which nobody sees who calls it."""

    def __init__(self):
        super().__init__()
        self.net = networks.Plain().float()

    def float(self):
        return self

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@guards("callbacks/running.py", "if self._repeats and", "if False and")
@guards("layers/observer.py", "loss.halved() if is_pair else loss", "loss", ids="17-bf16-mixed")
@pytest.mark.parametrize(
    ("precision", "net"),
    [("bf16-mixed", networks.Plain), ("bf16-true", networks.Plain), ("32-true", SwitchesItselfToHalf)],
    ids=["bf16-mixed", "bf16-true", "inside"],
)
@pytest.mark.parametrize("samples", [8, 17, 22])
def test_all_samples_are_measured_in_one_precision(tmp_path, monkeypatch, told, samples, precision, net):
    """The first batch, which shows what the step does, and one of a single sample too."""
    passes, update = [], Measurement.update
    monkeypatch.setattr(Measurement, "certify", lambda self, *batch, live: None)  # for the summary only
    monkeypatch.setattr(Measurement, "update", lambda self, *batch: passes.append(batch) or update(self, *batch))
    seed_everything()
    module = Module(net().float())
    module.lr = 0.0
    callback = lf.FlatnessCallback(summary=False)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    trainer = quiet_trainer(tmp_path, callback, precision=precision, num_sanity_val_steps=0)
    trainer.fit(module, *loaders(val_samples=samples))
    assert passes == []
    assert [OBSERVES in line for line in told] == [True]
    assert callback.report.precision == "bfloat16"
    assert callback.report.num_samples == samples
    first, second = callback.history
    assert first["relative_flatness"] == second["relative_flatness"]
    whole = lf.FlatnessCallback(summary=False)
    data = DataLoader(dataset(samples, 1), samples)
    quiet_trainer(tmp_path, whole, precision=precision).validate(module, data, verbose=False)
    assert whole.report.relative_flatness == pytest.approx(callback.report.relative_flatness, rel=0.01)


class SwitchesAutocastOff(Module):
    """From the third batch on."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        with torch.autocast("cpu", enabled=batch_idx < 2):
            super().validation_step(batch, batch_idx)


@guards("layers/live.py", "if self._precision is not None and current_precision() != self._precision:", "if False:")
def test_another_precision_than_that_of_the_trial_is_not_observed(tmp_path, told):
    callback = lf.FlatnessCallback()
    made = {"make": SwitchesAutocastOff}
    assert_same(
        run(tmp_path, "bf16-mixed", "validate", callback, **made), run(tmp_path, "bf16-mixed", "validate", **made)
    )
    assert OBSERVES in told[0]
    assert "in another precision than before" in told[1]


class MakesTensors(networks.Plain):
    """A tensor of the default type, which Lightning sets under bf16-true."""

    def tail(self, z, upstream):
        return F.silu(self.norm(z)) * torch.full((1, 1, 1, 1), 0.5)


@guards("model/precision.py", "            torch.set_default_dtype(self.default)\n", "")
def test_new_tensors_have_the_type_of_the_step(tmp_path, told):
    callback = lf.FlatnessCallback()
    made = {"net": MakesTensors}
    assert_same(
        run(tmp_path, "bf16-true", "validate", callback, **made), run(tmp_path, "bf16-true", "validate", **made)
    )
    assert [OBSERVES in line for line in told] == [True]


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        shortcut = self.shortcut(x)
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + shortcut)


class ResNet(Classifier):
    """Eight layers, for images of one channel."""

    def __init__(self):
        stem = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        blocks = (Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2))
        super().__init__(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def stripes(samples, seed):
    """Images of stripes in four directions, with noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (samples,), generator=generator)
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angle = y[:, None, None] * torch.pi / 4
    waves = torch.sin(row * angle.cos() + column * angle.sin())
    x = waves + 1.5 * torch.randn(samples, 12, 12, generator=generator)
    return TensorDataset(x[:, None], y)


@pytest.mark.slow
def test_trained_residual_network_has_the_numbers_of_float32(tmp_path, told):
    seed_everything()
    module = ResNet()
    train, test = (DataLoader(stripes(samples, seed), batch_size=32) for seed, samples in enumerate((256, 160)))
    quiet_trainer(tmp_path, max_epochs=4, precision="bf16-mixed").fit(module, train)
    expected = lf.measure_flatness(module.net.eval(), test)
    callback = lf.FlatnessCallback()
    quiet_trainer(tmp_path, callback, precision="bf16-mixed").validate(module, test, verbose=False)
    assert [OBSERVES in line for line in told] == [True]
    found = callback.report
    assert found.relative_flatness == pytest.approx(expected.relative_flatness, rel=0.01)
    assert found.hessian_trace == pytest.approx(expected.hessian_trace, rel=0.01)
    assert found.hessian_trace != pytest.approx(expected.hessian_trace, rel=1e-6)
    assert abs(found.precision_deviation) < 0.05


def test_float32_stays_float32(tmp_path, told):
    reports = []
    for is_live in (True, False):
        callback = lf.FlatnessCallback(live=is_live)
        run(tmp_path, "64-true", "validate", callback)
        reports.append(callback.report)
    for name, layer in reports[0].layers.items():
        assert_close(layer.block_traces, reports[1].layers[name].block_traces, rtol=1e-12, atol=1e-12)
