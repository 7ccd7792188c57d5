"""The network that those whose forward passes are observed derive from."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.callbacks.lightning_modules import CLASSES

KEPT = []  # what networks keep outside of themselves


def batch(samples=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


class Plain(nn.Module):
    """A convolution to be measured, a tail, global average pooling and a linear classifier; float64."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(1, 4, 3, padding=1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        upstream = self.before(x)
        return self.head(self.tail(self.conv(upstream), upstream))

    def before(self, x):
        return torch.tanh(self.stem(x))

    def tail(self, z, upstream):
        return F.silu(self.norm(z))

    def head(self, z):
        return self.fc(z.mean((2, 3)))
