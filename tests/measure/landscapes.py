"""A small network with BatchNorm, its batches, and copies of it that are moved by hand."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from lightning_flatness.functional import random_direction
from tests.networks import randomise_statistics

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def net(seed=0, head=None):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head or nn.Linear(3, 3),
    ).double()
    randomise_statistics(model)
    return model


X, Y = torch.randn(10, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(10) % 3
BATCHES = [(X[:7], Y[:7]), (X[7:], Y[7:])]


def own_loss(model, loss=F.cross_entropy):
    with torch.no_grad():
        return loss(copy.deepcopy(model).eval()(X), Y)


def moved(model, *steps):
    """A copy with ``alpha * direction`` added to its tensors, for all ``(alpha, direction)``."""
    other = copy.deepcopy(model)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for alpha, direction in steps:
            for name, tensor in direction.items():
                tensors[name] += alpha * tensor
    return other


def some_direction(model, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * d for name, d in random_direction(dict(model.named_parameters()), generator).items()}


def stepped(model, optimizer=torch.optim.Adam, steps=3, **options):
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return optimizer


class Interrupting:
    """Batches of which the n-th pass is interrupted, or fails."""

    def __init__(self, passes, error=KeyboardInterrupt):
        self.left, self.error = passes, error

    def __iter__(self):
        self.left -= 1
        if self.left < 0:
            raise self.error("no more")
        return iter(BATCHES)
