"""Layers that apply their kernels by functions, and a network around them."""

import torch
from torch import nn
from torch.nn import functional as F


class Own(nn.Module):
    def __init__(self, inputs, outputs, size=3):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(outputs, inputs, size, size))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Standardised(Own):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None])


class LowRank(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.delta = nn.Conv2d(inputs, outputs, 3), nn.Parameter(0.1 * torch.randn(outputs, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.conv.weight + self.delta, self.conv.bias)


class Together(Own):
    """A layer that puts its kernel together from two parameters."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs - 2)
        self.other = nn.Parameter(0.3 * torch.randn(2, inputs, 3, 3))

    def forward(self, x):
        return F.conv2d(x, torch.cat([self.weight, self.other]))


class Bank(Own):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, 3 * outputs)

    def forward(self, x):
        return F.conv2d(x, self.weight.chunk(3)[1])


class OwnLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight)


class Blur(nn.Module):
    def __init__(self, channels, registered):
        super().__init__()
        kernel = torch.ones(channels, 1, 2, 2).double() / 4
        if registered:
            self.register_buffer("kernel", kernel)
        else:
            self.kernel = kernel

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=len(self.kernel))


class Scaled(Own):
    def forward(self, x):
        return 2 * super().forward(x)


class Direct(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Conv2d(inputs, outputs, 3)

    def forward(self, x):
        return self.inner.forward(x)


class Listed(nn.Module):
    def __init__(self, inputs, outputs, scale=1):
        super().__init__()
        self.kernels, self.scale = nn.ParameterList([0.3 * torch.randn(outputs, inputs, 3, 3)]), scale

    def forward(self, x):
        return self.scale * F.conv2d(x, self.kernels[0]) if self.scale != 1 else F.conv2d(x, self.kernels[0])


def network(layer, head=None):
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), layer, nn.ReLU(), *pooled, head or nn.Linear(5, 3)).double()


X, Y = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
