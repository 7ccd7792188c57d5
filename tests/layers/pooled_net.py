"""A network that fits the closed form, with parts to replace by ones that may not."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.jacobians import jacobian_block_traces

X, Y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 1])


class PooledNet(nn.Module):
    """conv - SiLU - pooling - linear, with every part replaceable."""

    def __init__(self, conv=None, tail=None, head=None, after=None):
        super().__init__()
        torch.manual_seed(3)
        self.conv = conv if conv is not None else nn.Conv2d(2, 6, 3)
        self.tail = tail if tail is not None else nn.SiLU()
        self.head = head if head is not None else nn.Linear(6, 4)
        self.after = after if after is not None else nn.Identity()

    def forward(self, x):
        return self.after(self.head(self.tail(self.conv(x)).mean((2, 3))))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def measure(net):
    return lf.measure_flatness(net.double(), [(X.double(), Y)], strict=True)


def assert_not_closed_form(net, reason, exact=False):
    """The closed form must not apply; then the number is Gauss-Newton's, and the label right."""
    net = net.double().eval()
    layer = lf.measure_flatness(net, [(X.double(), Y)], layers="conv").layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", exact)
    expected = oracle_block_traces(net, (X.double(), Y), "conv") if exact else None
    gauss_newton = jacobian_block_traces(net, X.double(), "conv")
    scale = float(gauss_newton.abs().max())
    assert_close(layer.block_traces[0], gauss_newton, rtol=0, atol=1e-10 * scale)
    if exact:
        assert_close(layer.block_traces[0], expected, rtol=0, atol=1e-10 * scale)
    else:
        with pytest.raises(lf.NotExactError, match=reason):
            lf.measure_flatness(net, [(X.double(), Y)], layers="conv", strict=True)
