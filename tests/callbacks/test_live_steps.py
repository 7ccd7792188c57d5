"""What validation steps may do while the network is observed."""

import copy
import inspect
import io

import pytest
import torch

import lightning_flatness as lf
from lightning_flatness.measure.measurement import Measurement
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, global_modes, module_state
from tests.callbacks.lightning_modules import loaders, quiet_trainer
from tests.callbacks.live_runs import OBSERVES, Module, assert_as_without, make, validated
from tests.guarding import guards


class CallsNetwork(Module):
    def step(self, x):
        return self.net(x)


class CallsPart(CallsNetwork):
    """What its step calls is not all of the network."""

    def forward(self, x):
        return self.net(x).clone()


class CallsForward(Module):
    def step(self, x):
        return self.forward(x)


class ChangesInputs(Module):
    def step(self, x):
        return self(x + 0.0)


class CallsAgain(Module):
    def step(self, x):
        first = self(x)
        return (first + self(x)) / 2


class CallsOnOthersToo(Module):
    """Test-time augmentation."""

    def step(self, x):
        flipped = self(x.flip(3))
        return (self(x) + flipped) / 2


class Adversarial(Module):
    def step(self, x):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).square().sum(), x)
        return self((x + 0.01 * gradient.sign()).detach())


class WithGradients(Module):
    def step(self, x):
        with torch.enable_grad():
            return self(x)


class Autocast(Module):
    def step(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self(x).double()


class HooksInStep(Module):
    """Takes features by a hook that is there in the step only."""

    def step(self, x):
        features = []
        handle = self.net.norm.register_forward_hook(lambda module, arguments, output: features.append(output))
        logits = self(x)
        handle.remove()
        self.noted.append(features[0].numpy().copy().sum())
        return logits


STEPS = {
    CallsForward: OBSERVES,
    CallsOnOthersToo: OBSERVES,
    CallsNetwork: OBSERVES,
    CallsPart: OBSERVES,
    ChangesInputs: OBSERVES,
    CallsAgain: OBSERVES,
    Autocast: OBSERVES,  # float64 is not cast
    HooksInStep: "changes modes or hooks",
}


@guards("layers.live:_state", returns=None, ids="HooksInStep")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_validation_step(tmp_path, told, step):
    assert_as_without(tmp_path, make("Plain", step), told, STEPS[step])


@guards("callbacks/running.py", "(FlatnessError, RuntimeError) as", "ZeroDivisionError as")
def test_observed_pass_that_cannot_be_used(tmp_path, told, monkeypatch):
    def fails(*_):
        raise lf.LayerSelectionError("it cannot")

    monkeypatch.setattr(Measurement, "update_observed", fails)
    assert_as_without(tmp_path, make("Plain"), told, "could not be used (it cannot)")


def test_a_step_that_calls_the_network_on_several_inputs_of_its_own_is_refused(tmp_path, told):
    with pytest.raises(
        lf.FlatnessError, match="on 2 different inputs, none of which is the batch's own input. Give batch_fn="
    ):
        validated(tmp_path, make("Plain", Adversarial), lf.FlatnessCallback())
    callback = lf.FlatnessCallback(batch_fn=lambda batch: batch)
    assert_same(
        validated(tmp_path, make("Plain", Adversarial), callback), validated(tmp_path, make("Plain", Adversarial))
    )
    assert callback.report.num_samples == 22


class CopiesNetwork(Module):
    """Keeps copies of the network, and files of it, from within its step."""

    def __init__(self, net=None):
        super().__init__(net)
        self.kept = {}

    def step(self, x):
        self.kept |= {"copied before": copy.deepcopy(self.net), "saved before": saved(self.net)}
        logits = self.net(x)  # which is the network, then
        self.kept |= {"copied after": copy.deepcopy(self.net), "saved after": saved(self.net), "x": x, "y": logits}
        assert inspect.signature(self.net.forward) == inspect.signature(type(self.net).forward.__get__(self.net))
        return logits


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    return file.getvalue()


@guards("model/call.py", 'getattr, (self._module, "forward")', "_Forward, (self._module, self._attribute)")
@guards("model.call:_Forward.__deepcopy__", body="return self")
def test_copies_and_files_of_a_network_have_nothing_of_ours(tmp_path, told):
    assert_as_without(tmp_path, make("Plain", CopiesNetwork), told, OBSERVES)
    module = CopiesNetwork(networks.Plain())
    quiet_trainer(tmp_path, lf.FlatnessCallback()).validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    x, y = module.kept["x"], module.kept["y"]
    for name in ("before", "after"):
        copied, file = module.kept[f"copied {name}"], module.kept[f"saved {name}"]
        assert b"lightning_flatness" not in file
        loaded = torch.load(io.BytesIO(file), weights_only=False)
        for network in (copied, loaded):
            assert network.forward == type(network).forward.__get__(network)
            with torch.no_grad():
                assert torch.equal(network(x), y)
        copied.fc = torch.nn.Identity()  # its own, not the network's
        with torch.no_grad():
            assert copied(x).shape != y.shape


@guards("layers/live.py", "if torch.is_grad_enabled():", "if False:")
def test_validation_step_with_gradients(tmp_path, told):
    options = {"inference_mode": False}
    assert_as_without(tmp_path, make("Plain", WithGradients), told, "records gradients", trainer_options=options)


@guards("layers/trial.py", "if module.training:", "if False:")
def test_module_that_stays_in_training_mode(tmp_path, told):
    class Keeps(Module):
        def on_validation_model_eval(self):
            super().on_validation_model_eval()
            self.net.fc.train()

    assert_as_without(tmp_path, make("Plain", Keeps), told, "'net.fc' is in training mode")


def test_network_is_an_attribute(tmp_path, told):
    assert_as_without(tmp_path, make("Plain", CallsNetwork), told, OBSERVES, model="net")


WHERE = ["before the layer", "in the tail", "after the classifier"]


class Catches(Module):
    """The network raises an error in the second batch's step; the step goes on without it."""

    where, error = None, ValueError

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.where, self.net.error = self.where if batch_idx == 1 else None, self.error
        try:
            super().validation_step(batch, batch_idx)
        except BaseException as error:
            assert str(error) == "bang"  # noqa: PT017
            fresh = torch.ones(2) * 2
            self.noted.append([global_modes(), fresh.is_inference(), fresh.requires_grad])
        finally:
            self.net.where = None


def leaves_out_the_second_batch(batch):
    second = list(loaders(dtype=torch.float64)[1])[1]
    return None, None if torch.equal(batch[1], second[1]) else batch[1]


@guards("layers/live.py", 'self.reason = "the network raised an error"\n                raise', "pass")
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", WHERE)
def test_error_that_is_caught(tmp_path, told, where, error):
    made = []

    def make_one():
        made.append(Catches(networks.Bomb()))
        made[-1].where, made[-1].error = where, error
        return made[-1]

    assert_as_without(tmp_path, make_one, told, OBSERVES, batch_fn=leaves_out_the_second_batch)
    assert error is RuntimeError or [module.net.num_raised for module in made] == [1, 1, 1]


def test_error_that_is_caught_is_no_call_of_the_network(tmp_path):
    def make_one():
        module = Catches(networks.Bomb())
        module.where = "after the classifier"
        return module

    with pytest.raises(lf.BatchError, match=r"does not call the network in batch 1.*\(None, None\)"):
        validated(tmp_path, make_one, lf.FlatnessCallback())


class Throws(Catches):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.where, self.net.error = self.where if batch_idx == 1 else None, self.error
        Module.validation_step(self, batch, batch_idx)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", WHERE)
def test_error_that_is_not_caught(tmp_path, told, where, error, inference_mode):
    module = Throws(networks.Bomb())
    module.where, module.error = where, error
    before = global_modes()
    hooks = module_state(module)["hooks"]
    trainer = quiet_trainer(tmp_path, lf.FlatnessCallback(), inference_mode=inference_mode)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error, match="bang|1"):
        trainer.validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    assert global_modes() == before
    assert OBSERVES in told[0]
    assert module_state(module)["hooks"] == hooks
    assert "_Forward" not in repr(vars(module).get("forward"))
    assert not (torch.ones(1) * 2).is_inference()


class FailsUnderGradients(Module):
    """In one batch the network does what autograd does not allow."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.moody = batch_idx == 1
        super().validation_step(batch, batch_idx)
        self.net.moody = False


@guards("layers/live.py", "recorder.nodes and isinstance(error, RuntimeError)", "False")
def test_forward_that_fails_with_gradients_on_some_batches_only(tmp_path, told):
    assert_as_without(tmp_path, make("Moody", FailsUnderGradients), told, "Can't call numpy")
    assert OBSERVES in told[0]
