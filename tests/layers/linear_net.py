"""Three linear layers in an order that a test gives, and a batch of vectors."""

import torch
from torch import nn

SEED = torch.Generator().manual_seed(0)
VECTORS = torch.randn(8, 6, generator=SEED).double()
LABELS = torch.randint(4, (8,), generator=SEED)


class LinearNet(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def linear_net(forward=lambda net, x: net.c(net.a(x).relu())):
    """In float64; ``forward(net, x)`` returns the logits."""
    return LinearNet(forward).double()
