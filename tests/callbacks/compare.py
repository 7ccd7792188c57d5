"""What a run leaves behind, and a stand-in for the callback in the run that it is compared with."""

import copy
import random

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") and "state_dict" not in name]


def seed_all(seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def random_states():
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        "python": hash(random.getstate()),
    }


def global_modes():
    """Everything that holds for the whole process and that a measurement sets for its time."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": str(torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "compile stance": torch._dynamo.eval_frame._stance.stance,
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "anomalies": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "saved tensors": torch._C._autograd._saved_tensors_hooks_is_enabled(),
    }


def num_hooks(model):
    return sum(len(getattr(module, name)) for module in model.modules() for name in HOOKS)


def module_state(module):
    """Weights, buffers, flags and hooks of a module."""
    parameters = dict(module.named_parameters())
    return {
        "weights": {key: value.detach().clone() for key, value in module.state_dict().items()},
        "training flags": {name: part.training for name, part in module.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "hooks": num_hooks(module),
        "attributes": {name: sorted(vars(part)) for name, part in module.named_modules()},
    }


def end_of(trainer, module):
    """Everything that training leaves behind."""
    return {
        **module_state(module),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "random states": random_states(),
        "modes": global_modes(),
        "progress": (trainer.current_epoch, trainer.global_step, trainer.should_stop),
    }


def assert_same(found, expected, where="the run"):
    """Equal to the last bit, through all levels."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}, {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}, {index}")
    elif isinstance(expected, (torch.Tensor, float)):
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert found == expected, f"{where}: {found} in place of {expected}"


class Recorder(Callback):
    """What the callbacks log at every validation, and the network that they measured; goes after them."""

    def __init__(self, network, callbacks):
        self.network, self.callbacks = network, callbacks
        self.logged, self.measured, self._records = [], None, 0

    def note(self, trainer, pl_module):
        keys = [key for key in trainer.callback_metrics if key.split("/")[0] in self.prefixes]
        self.logged.append({key: trainer.callback_metrics[key].clone() for key in keys})
        if self.callbacks and len(self.callbacks[0].history) != self._records:
            self._records = len(self.callbacks[0].history)
            network = getattr(pl_module, self.network)
            self.measured = copy.deepcopy(getattr(network, "_orig_mod", network))

    @property
    def prefixes(self):
        return [callback.prefix for callback in self.callbacks]

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.note(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if not trainer.enable_validation:
            self.note(trainer, pl_module)


class StandIn(Callback):
    """Logs what the callback logged in another run, so that monitors and schedulers see the same."""

    def __init__(self, logged):
        self.logged = iter(logged)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            for key, value in next(self.logged).items():
                pl_module.log(key, value, on_step=False, on_epoch=True, add_dataloader_idx=False)

    def on_train_epoch_end(self, trainer, pl_module):
        if not trainer.enable_validation:
            self.on_validation_epoch_end(trainer, pl_module)
