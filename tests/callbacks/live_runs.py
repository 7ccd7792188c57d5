"""Validations in which the network is observed."""

import torch
from torch.testing import assert_close

import lightning_flatness as lf
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, global_modes, module_state, random_states
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.callbacks.training_runs import seed_everything

OBSERVES = "observes the forward passes"
OWN = "in forward passes of its own"


class Module(Classifier):
    """Notes what its forward returns in validation, and in which modes it is left."""

    def __init__(self, net):
        super().__init__(net)
        self.noted = []

    def step(self, x):
        return self(x)

    def note(self, output):
        tensors = list(output.values()) if isinstance(output, dict) else [output]
        kinds = [(tensor.requires_grad, tensor.is_inference(), tensor.is_leaf) for tensor in tensors]
        self.noted.append([[tensor.detach().clone() for tensor in tensors], kinds, global_modes()])
        return tensors[0]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self.note(self.step(batch[0]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).double().mean(), batch_size=len(batch[1]))


def validated(folder, make, *callbacks, trainer_options=None, val_samples=22):
    """A validation, and everything that it leaves behind."""
    seed_everything()
    module = make()
    loader = loaders(dtype=torch.float64, val_samples=val_samples)[1]
    trainer = quiet_trainer(folder, *callbacks, **(trainer_options or {}))
    trainer.validate(module, loader, verbose=False)
    logged = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("flatness")}
    return {"noted": module.noted, "logged": logged, "random": random_states(), "modes": global_modes()} | module_state(
        module
    )


def assert_as_without(folder, make, told, says, *, trainer_options=None, val_samples=22, **options):
    """The run is the same without the callback; its number that of passes of its own; what is used is said once."""
    run = {"trainer_options": trainer_options, "val_samples": val_samples}
    expected = validated(folder, make, **run)
    own = lf.FlatnessCallback(live=False, **options)
    validated(folder, make, own, **run)
    assert told == []
    callback = lf.FlatnessCallback(**options)
    assert_same(validated(folder, make, callback, **run), expected)
    for name, layer in own.report.layers.items():
        assert_close(callback.report.layers[name].block_traces, layer.block_traces, rtol=1e-9, atol=0)
        assert_close(
            callback.report.layers[name].relative_flatness, layer.relative_flatness, rtol=1e-9, atol=0, equal_nan=True
        )
    assert callback.report.num_samples == own.report.num_samples
    assert says in told[-1]
    assert len(told) <= 2
    return callback


def make(name, module_class=Module):
    return lambda: module_class(getattr(networks, name)())
