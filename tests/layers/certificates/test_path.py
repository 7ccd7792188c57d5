"""The logits may depend on a kernel through the measured layer only."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.recording import Recorder
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import PooledNet, X, Y, assert_not_closed_form, measure


def test_shared_weight_is_refused():
    net = PooledNet(
        conv=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3)), head=nn.Linear(2, 4)
    )
    assert_matches_oracle(net, (X, Y), "conv.2")
    net.conv[2].weight = net.conv[0].weight
    with pytest.raises(lf.LayerSelectionError, match=r"'conv.2'.*shared with another layer"):
        measure(net)


def test_weight_used_again_in_the_forward_is_refused():
    class Again(PooledNet):
        def forward(self, x):
            return super().forward(x + F.pad(F.conv2d(x, self.conv.weight[:2]), (1, 1, 1, 1)))

    with pytest.raises(lf.LayerSelectionError, match="used again in the forward"):
        measure(Again())


def test_layer_used_twice_is_measured():
    class Twice(PooledNet):
        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)) + self.conv(x.flip(3)).relu().mean((2, 3)))

    assert_not_closed_form(Twice(), "", exact=True)


def test_layer_inside_a_no_grad_block_is_refused_with_a_remedy():
    class Frozen(PooledNet):
        def forward(self, x):
            with torch.no_grad():
                x = self.conv(x)
            return self.head(self.tail(x).mean((2, 3)))

    with pytest.raises(
        lf.LayerSelectionError, match=r"'conv': it runs under torch.no_grad\(\).*requires_grad_\(False\)"
    ):
        measure(Frozen())


def test_frozen_layer_is_measured():
    assert_matches_oracle(PooledNet().requires_grad_(False), (X, Y), "conv")


@pytest.mark.parametrize("hidden", [nullcontext, torch._C.DisableTorchFunctionSubclass], ids=["seen", "hidden"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_kernel_that_some_batches_use_twice(order, hidden):
    def forward(net, x):
        h = net.a(x).relu()
        if x.mean() > 0.5:
            with hidden():  # as inputs of a class of their own do
                h = F.linear(F.pad(h, (0, 1)), net.a.weight).relu()
        return net.c(h)

    batches = [(VECTORS - 1, LABELS), (VECTORS + 1, LABELS)][::order]
    with pytest.raises(lf.LayerSelectionError, match="'a'.*depend on its kernel in another way"):
        lf.measure_flatness(linear_net(forward), batches, layers="a")


def test_uses_that_do_not_matter_are_fine():
    def forward(net, x):
        if x.mean() > 0.5:
            net.a.weight.norm()
        return net.c(net.a(x).relu())

    net = linear_net(forward)
    report = lf.measure_flatness(net, [(VECTORS - 1, LABELS), (VECTORS + 1, LABELS)], layers="a")
    expected = oracle_block_traces(net, (torch.cat([VECTORS - 1, VECTORS + 1]), torch.cat([LABELS, LABELS])), "a")
    assert_close(report.layers["a"].block_traces[0], expected, rtol=1e-10, atol=1e-14)


@guards("layers/certify.py", "len(functions) != len(recorded.calls[name]) or ", "")
@pytest.mark.parametrize("layers", ["conv", "classifier"])
def test_a_weight_that_is_used_again_on_some_samples_is_refused_on_these(layers):
    class Again(PooledNet):
        def forward(self, x):
            g = self.conv(x).relu().mean((2, 3))
            if layers == "classifier":
                return self.head(g) + (F.linear(g, self.head.weight).abs() - 2).relu()
            return self.head(g + (F.conv2d(x, self.conv.weight).abs().mean((2, 3)) - 2).relu())

    net = Again().double().eval()
    small, large = (X.double() / 20, Y), (20 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers=layers).exact
    with pytest.raises(lf.LayerSelectionError, match="used again in the forward"):
        lf.measure_flatness(net, [small, large], layers=layers)


def test_reading_the_shape_of_a_weight_is_no_use():
    class Reads(nn.Conv2d):
        def forward(self, x):
            assert self.weight.ndim == x.ndim == len(self.weight.shape)
            return F.conv2d(x, self.weight.to(x), self.bias)

    net = PooledNet(conv=Reads(2, 6, 3)).double().eval()
    with Recorder({"conv": net.conv}, net.head, {"conv": net.conv.weight}) as recorder:
        output = net(X.double())
    assert recorder.result(X, output).kernel_uses == (("conv", "conv2d"),)
