"""A network that is measured, and the assertion that a change of it, or of its batches, is refused."""

import pytest
import torch
from torch import nn

import lightning_flatness as lf

X, Y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 1])


class Net(nn.Module):
    """conv - SiLU - pooling - linear; a test changes what comes out of a part of it."""

    def __init__(self, output=None, tail=None, classes=4):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(2, 3, 1)
        self.conv = nn.Conv2d(3, 6, 3)
        self.activation = nn.SiLU()
        self.tail = tail or (lambda x: x)
        self.head = nn.Linear(6, classes)
        self.idle = nn.Conv2d(3, 6, 3)
        self.output = output or (lambda logits: logits)

    def forward(self, x):
        pooled = self.tail(self.activation(self.conv(self.stem(x)))).mean((2, 3))
        return self.output(self.head(pooled))


def measure(net=None, batches=((X, Y),), **kwargs):
    return lf.measure_flatness(net or Net(), batches, **kwargs)


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        measure(*args, **kwargs)
    assert isinstance(caught.value, lf.FlatnessError)
    assert isinstance(caught.value, ValueError)
