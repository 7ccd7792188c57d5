"""Watching a step: it goes on, keeps nothing in memory, and shows the network."""

import weakref

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.callbacks.network import Network
from lightning_flatness.callbacks.step_watch import StepWatch
from tests.callbacks.lightning_modules import Classifier, Net
from tests.guarding import guards


class Counts(nn.Linear):
    def forward(self, x, steps):
        return sum(super(Counts, self).forward(x) for _ in steps)


def with_another(other):
    module = Classifier()
    module.other = other
    return module


def test_arguments_of_other_modules_do_not_stop_the_step():
    module = with_another(Counts(3, 3))
    with StepWatch(module, Network(module.net)):
        assert module.other(module.net(torch.zeros(2, 1, 8, 8)), range(3)).shape == (2, 3)


@guards("callbacks/step_watch.py", "[] if self.several else [*self.within, heard]", "[*self.within, heard]", ids="None")
@guards("callbacks/step_watch.py", "if any(_takes(heard, call.output) for call in self._calls) else []", "", ids="net")
@pytest.mark.parametrize("name", [None, "net"])
def test_a_step_keeps_no_activations(name):
    module, outputs, alive = with_another(Net() if name else None), [], []
    watched = module.other if name else module.net
    for layer in (watched.conv1, watched.conv2):
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(weakref.ref(output)))
    watched.fc.register_forward_pre_hook(lambda *_: alive.extend(output() is not None for output in outputs))
    with torch.no_grad(), StepWatch(module, Network(module.net) if name else None):
        for network in dict.fromkeys([module.net, watched]):
            network(torch.zeros(2, 1, 8, 8))
    assert alive == [False, False]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Net(), Net()

    def forward(self, x):
        return [self.one(x), self.other(x)]


def test_a_network_without_logits_is_refused_although_its_parts_return_some():
    module, x = Classifier(Two()), torch.zeros(2, 1, 8, 8)
    with StepWatch(module, None) as watch:
        module.net(x)
    with pytest.raises(lf.BatchError, match="'net': The model returns a list"):
        watch.found(x)
