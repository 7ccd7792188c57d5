"""Gauss-Newton is exact only where the logits are affine in a layer's weight, on all samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import Apply, PooledNet, X, Y


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.c(torch.tanh(net.a(x) - net.b(x))),
        lambda net, x: net.c((net.a(x) - net.b(x)).square()),
        lambda net, x: net.c(F.gelu(net.a(x) + net.b(x))),
        lambda net, x: net.c(torch.tanh(net.a(x) - net.b(x).flip(1))),
    ],
    ids=["difference", "distance", "sum", "flipped"],
)
def test_layers_whose_curvatures_cancel_each_other(forward):
    net = linear_net(forward)
    report = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all")
    assert [layer.exact for layer in report.layers.values()] == [False, False, True]
    with pytest.raises(lf.NotExactError):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all", strict=True)


class Relu(torch.autograd.Function):
    """Named like a function that cannot curve."""

    @staticmethod
    def forward(x):
        return (x - 2).relu().square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * (ctx.saved_tensors[0] - 2).relu()


@guards("model/graph.py", "(kind in LINEAR_IN_ONE and num_inputs == 1)", "kind in LINEAR_IN_ONE", ids="product")
@guards("model/graph.py", "isinstance(node, BackwardCFunction) or getattr", "getattr", ids="custom")
@guards("model/graph.py", ' or getattr(node, "_saved_training", False)', "", ids="instance norm")
@guards("model.graph:cannot_curve", returns=True)
@pytest.mark.parametrize(
    "curve",
    [
        lambda h: h.tanh() if bool(h.detach().amax() > 2) else h,
        lambda h: h + h * (h - 2).relu(),
        lambda h: h + ((h - 2).relu()[:, None] @ h[:, :, None])[:, 0],
        lambda h: h + Relu.apply(h),
        lambda h: F.instance_norm(h[:, None])[:, 0] if bool(h.detach().amax() > 2) else h,
    ],
    ids=["other function", "product", "matrix product", "custom", "instance norm"],
)
def test_curvature_that_only_later_samples_show(curve):
    net = linear_net(lambda net, x: net.c(curve(net.a(x))))
    small, large = (VECTORS[:1] / 10, LABELS[:1]), (30 * VECTORS[:1], LABELS[:1])  # one sample, so that nothing mixes
    assert lf.measure_flatness(net, [small], layers="a").exact
    assert not lf.measure_flatness(net, [large], layers="a").exact
    assert not lf.measure_flatness(net, [small, large], layers="a").exact


@guards("layers/certificates/__init__.py", " and not due", "")
def test_hooks_that_curve_later_are_noticed_in_the_end():
    def forward(net, x):
        h = net.a(x).relu()
        out = net.c(h)
        late = (x.detach().abs().amax() > 5).to(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * (1 + late * out))
        return out + 0

    small, large = (VECTORS / 10, LABELS), (30 * VECTORS, LABELS)
    assert lf.measure_flatness(linear_net(forward), [small], layers="a").exact
    assert not lf.measure_flatness(linear_net(forward), [small, *[large] * 16], layers="a").exact


def test_curvature_that_first_shows_in_a_later_batch_is_labelled():
    net = PooledNet(tail=nn.ReLU(), after=Apply(lambda f: f + F.relu(f - 2) ** 2)).double()
    small, large = (X.double() / 10, Y), (30 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers="head").exact
    assert not lf.measure_flatness(net, [large], layers="head").exact
    assert not lf.measure_flatness(net, [small, large], layers="head").exact
    with pytest.raises(lf.NotExactError, match="'head'"):
        lf.measure_flatness(net, [small, large], layers="head", strict=True)
