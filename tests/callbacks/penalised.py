"""Modules whose training step adds the penalty by hand, or does what the callback must see or refuse."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_flatness.functional import flatness_penalty
from tests.callbacks.lightning_modules import CLASSES, Classifier, loaders, quiet_trainer

WEIGHTS = (0.5, 1.0, 2.0)


class WithLoss(Classifier):
    """Its loss takes the options of cross-entropy."""

    def __init__(self, net=None, **options):
        super().__init__(net)
        self.options = options

    def loss(self, logits, y):
        options = dict(self.options)
        if "class_weight" in options:
            options["weight"] = torch.tensor(options.pop("class_weight"), dtype=logits.dtype)
        return F.cross_entropy(logits, y, **options)

    def training_step(self, batch, batch_idx):
        self.training_steps += 1
        x, y = batch
        return self.loss(self.net(x), y)


class ByHand(WithLoss):
    """Adds the penalty in the training step; ``strength`` is a number, or a function of the optimizer's steps."""

    def __init__(self, net=None, strength=0.3, measure="relative_flatness", normalize=False, **options):
        super().__init__(net, **options)
        self.strength = strength
        self.kind = {"measure": measure, "normalize": normalize}

    def training_step(self, batch, batch_idx):
        self.training_steps += 1
        x, y = batch
        calls = []
        handle = self.net.fc.register_forward_hook(lambda _, given, returned: calls.append((given[0], returned)))
        logits = self.net(x)
        handle.remove()
        strength = self.strength(self.trainer.global_step) if callable(self.strength) else self.strength
        penalty = flatness_penalty(*calls[0], self.net.fc.weight, y, **self.kind, **self.options)
        return self.loss(logits, y) + strength * penalty


class ConvolutionAtTheEnd(nn.Module):
    """Its classifier is a convolution of size one on pooled features."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 5, 3)
            self.fc = nn.Conv2d(5, classes, 1)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3), keepdim=True)).flatten(1)


class Step(Classifier):
    """Runs a given function of the module, inputs and targets as its training step."""

    def __init__(self, step, net=None):
        super().__init__(net)
        self.step = step
        self.other = nn.Linear(5, CLASSES)
        self.hidden = nn.Linear(64, 64)

    def features(self, x):
        x = F.relu(self.net.norm1(self.net.conv1(x)))
        return F.relu(self.net.norm2(self.net.conv2(x))).mean((2, 3))

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


def checkpointed(module, x, y):
    return F.cross_entropy(module.net.fc(checkpoint(module.features, x, use_reentrant=False)), y)


def fitted(folder, module, *callbacks, fit=None, data=None, **options):
    """The Trainer after a fit of two epochs, from a fixed random state."""
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, **options)
    trainer.fit(module, *(data or loaders()), **(fit or {}))
    return trainer


def weights_of(module):
    return {name.replace("_orig_mod.", ""): value.clone() for name, value in module.state_dict().items()}
