"""Networks that write, draw numbers or fail on their way, and what may happen in a measurement of them."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from tests.networks import randomise_statistics


class UserError(RuntimeError):
    """What a user's forward raises."""


class Spot(nn.Module):
    """A place in a network where a test makes something happen, from its ``on_call``-th call on."""

    def __init__(self):
        super().__init__()
        self.action, self.on_call, self.calls = None, 1, 0

    def forward(self, x):
        self.calls += 1
        return self.action(x) if self.action and self.calls >= self.on_call else x


class LayerWithSpot(nn.Conv2d):
    """A convolution that can fail on its way."""

    def __init__(self, *args):
        super().__init__(*args)
        self.spot = Spot()

    def forward(self, x):
        return super().forward(self.spot(x))


class Net(nn.Module):
    def __init__(self, tail=None):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.upstream = Spot()
        self.conv = LayerWithSpot(4, 6, 3)
        self.tail = tail if tail is not None else nn.SiLU()
        self.downstream = Spot()
        self.head = nn.Linear(6, 4)
        randomise_statistics(self)

    def forward(self, x):
        x = self.upstream(self.norm(self.stem(x)).relu())
        return self.head(self.downstream(self.tail(self.conv(x))).mean((2, 3)))


class WritesInput(Net):
    def forward(self, x):
        x.mul_(2).add_(1)
        return super().forward(x)


class WritesBuffers(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        self.hidden.data.copy_(torch.ones(3))
        # Statistics of the batch although the module is in evaluation mode.
        torch.nn.functional.batch_norm(x, self.mean.clone(), self.mean.abs().clone(), training=True)
        torch.nn.functional.batch_norm(self.stem(x), self.norm.running_mean, self.norm.running_var, training=True)
        return super().forward(x)


class WritesWeights(Net):
    def forward(self, x):
        with torch.no_grad():
            self.stem.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class DrawsNumbers(Net):
    def forward(self, x):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return super().forward(x) + 0 * noise


class CountsItsCalls(Net):
    """Its logits depend on a buffer that every call changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.calls * super().forward(x)


def plain():
    return Net().eval()


def train_mode():
    return Net().train()


def mixed_flags():
    net = Net().train()
    net.norm.eval()
    net.tail.training = False
    return net


def dropout_and_norm():
    return Net(nn.Sequential(nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.3))).train()


def with_hooks():
    net = Net()
    handles = []
    for module in net.modules():
        handles.append(module.register_forward_hook(lambda module, args, out: None))
        handles.append(module.register_forward_pre_hook(lambda module, args: None))
    handles.append(net.stem.register_forward_hook(lambda module, args, kwargs, out: None, with_kwargs=True))
    handles[3].remove()
    return net


def with_backward_hooks():
    net = Net()
    for module in net.modules():
        module.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return net


def with_gradients():
    net = Net()
    cross_entropy(net(torch.randn(4, 2, 6, 6)), torch.tensor([0, 1, 2, 3])).backward()
    return net


def partly_frozen():
    net = Net()
    net.conv.requires_grad_(False)
    net.stem.requires_grad_(False)
    return net


def tied_parameter():
    net = Net()
    net.bias_of_the_stem = net.stem.bias
    return net


def module_with_two_names():
    net = Net()
    net.classifier = net.head
    net.backbone = nn.Sequential(net.stem, net.norm)
    return net


def compiled_part():
    net = Net()
    net.tail = torch.compile(nn.Sequential(nn.BatchNorm2d(6), nn.SiLU()), backend="eager")
    return net


def compiled_and_used():
    net = compiled_part()
    net(torch.randn(2, 2, 6, 6))
    return net


def compiled_by_aot():
    net = Net()
    net.tail = torch.compile(nn.SiLU(), backend="aot_eager")
    return net


MODELS = (
    plain, train_mode, mixed_flags, dropout_and_norm, with_hooks, with_backward_hooks, with_gradients, partly_frozen,
    tied_parameter, module_with_two_names, WritesInput, WritesBuffers, WritesWeights, DrawsNumbers, compiled_part,
    compiled_and_used, compiled_by_aot,
)  # fmt: skip


def fail(x):
    raise UserError("in the forward")


# By name: a spot, what it does, from which call on, and the error that a measurement ends with. In a measurement the
# model is called to see what runs, then to observe, then to certify.
EVENTS = {
    "nothing_happens": ("upstream", None, 1, None),
    "upstream_fails": ("upstream", fail, 1, UserError),
    "layer_fails": ("conv.spot", fail, 1, UserError),
    "layer_fails_when_observed": ("conv.spot", fail, 2, UserError),
    "tail_fails": ("downstream", fail, 1, UserError),
    "tail_fails_when_observed": ("downstream", fail, 2, UserError),
    "tail_fails_when_certified": ("downstream", fail, 3, UserError),
    "certificate_refuses": ("downstream", lambda x: x - x.mean(0, keepdim=True), 1, lf.LayerSelectionError),
    "data_are_refused": ("downstream", lambda x: x * torch.nan, 1, lf.BatchError),
}


def arrange(net, event):
    """Let something happen in a measurement of the network, and return the error that it ends with."""
    name, action, on_call, error = EVENTS[event]
    spot = net.get_submodule(name)
    spot.action, spot.on_call = action, on_call
    return error


def block_traces(net, batch):
    (layer,) = lf.measure_flatness(net, [batch]).layers.values()
    return layer.block_traces
