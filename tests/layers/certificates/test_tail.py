"""Tails between layer and classifier: measured in closed form where they fit, labelled where they do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.guarding import guards
from tests.layers.pooled_net import Apply, PooledNet, X, Y, assert_not_closed_form, measure


@pytest.mark.parametrize(
    "tail",
    [
        nn.Sequential(nn.BatchNorm2d(6), nn.Mish()),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.MaxPool2d(2), nn.Tanh()),  # the maximum picks single positions, so this is elementwise too
        nn.ChannelShuffle(2),
        nn.PReLU(6),
        Apply(lambda x: x**3),
        Apply(lambda x: torch.relu_(x)),
    ],
    ids=["mish", "max-pool", "max-pool-tanh", "shuffle", "prelu", "cube", "in-place"],
)
def test_other_tails_that_fit_are_measured(tail):
    tail = tail.eval()
    assert_matches_oracle(PooledNet(tail=tail), (X, Y), "conv")


def test_layer_under_a_depthwise_convolution_is_measured():
    # It acts on every channel by itself; only "last" would choose the depthwise convolution.
    tail = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 2, groups=6))
    assert_matches_oracle(PooledNet(tail=tail), (X, Y), "conv")
    assert_matches_oracle(PooledNet(tail=tail), (X, Y), "tail.1")


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (nn.LayerNorm([6, 4, 4]), "channels"),
        (nn.GroupNorm(2, 6), "channels"),
        (nn.Sequential(nn.InstanceNorm2d(6, affine=True), nn.ReLU()), "positions of one channel interact"),
        (nn.Softmax(dim=1), "channels"),
        (Apply(lambda x: x * torch.sigmoid(x.mean((1, 2, 3), keepdim=True))), "channels"),  # squeeze-excitation
        (Apply(lambda x: x * x.flatten(2).softmax(2).unflatten(2, x.shape[2:])), "positions"),  # attention pooling
        (Apply(lambda x: F.hardsigmoid(x)), "no second derivative"),
    ],
    ids=["layer", "group", "instance", "softmax", "se", "attention", "hardsigmoid"],
)
def test_curved_tails_that_do_not_fit_are_labelled(tail, reason):
    assert_not_closed_form(PooledNet(tail=tail), f"'conv'.*{reason}")


@pytest.mark.parametrize(
    "tail",
    [
        Apply(lambda x: torch.cat([x[:, :3].relu(), (-x[:, :3]).relu()], 1)),  # CReLU
        Apply(lambda x: torch.cat([x[:, :3], -x[:, :3]], 1)),  # slopes that cancel
        Apply(lambda x: x.roll(1, 0).roll(-1, 0) + x.mean(1, keepdim=True).relu()),
    ],
    ids=["crelu", "cancel", "mix"],
)
def test_piecewise_linear_tails_that_do_not_fit_are_exact_all_the_same(tail):
    assert_not_closed_form(PooledNet(tail=tail), "", exact=True)


def assert_noticed(tail, num_batches):
    """A tail that mixes channels where the inputs are large, as they are in all batches but the first."""
    net = PooledNet(tail=Apply(tail)).double()
    batches = [(X.double(), Y)] + [(10 + X.double(), Y)] * num_batches
    assert lf.measure_flatness(net, batches[:1], layers="conv").layers["conv"].method == "closed_form"
    layer = lf.measure_flatness(net, batches, layers="conv").layers["conv"]
    assert layer.method == "gauss_newton"
    assert not layer.exact


def test_a_tail_that_becomes_another_is_certified_anew():
    assert_noticed(lambda x: F.silu(x.cumsum(1) if x.detach().abs().mean() > 2 else x), 1)


@guards("layers/certificates/__init__.py", " and fingerprint == self.fingerprint", "")
def test_a_linear_tail_that_becomes_another_is_certified_anew():
    tail = Apply(lambda x: x + x.mean(1, keepdim=True) if x.detach().abs().mean() > 2 else x + 1)
    net, batches = PooledNet(tail=tail).double(), [(X.double(), Y), (10 + X.double(), Y)]
    layer = lf.measure_flatness(net, batches, layers="conv").layers["conv"]
    traces = torch.stack([oracle_block_traces(net, batch, "conv") for batch in batches]).mean(0)
    assert (layer.method, layer.exact) == ("gauss_newton", True)
    assert_close(layer.block_traces[0], traces, rtol=1e-9, atol=1e-12)


def test_channels_that_are_moved_by_indices():
    def tail(x):
        # Where inputs are large, every channel is joined by the second one, and else by nothing.
        others = torch.tensor([1, 6])[(x.detach().abs().mean() > 2).long().neg() + 1].expand(6)
        return F.silu(x + F.pad(x, (0, 0, 0, 0, 0, 1))[:, others])

    assert_noticed(tail, 1)


@guards("layers/certificates/__init__.py", " and not due", "")
def test_a_tail_is_certified_in_full_again_and_again():
    """The same operations with the same constants, which seem to act on every channel by itself.

    Three-dimensional pooling takes the channels for depth here.
    """

    def tail(x):
        mixes = (x.detach().abs().mean() > 2).to(x)
        neighbours = F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1)
        return F.silu((1 - mixes) * x + mixes * neighbours)

    assert_noticed(tail, 16)
    with pytest.raises(AssertionError):  # between two full certificates it is not seen
        assert_noticed(tail, 3)


def test_detached_layer_is_refused():
    with pytest.raises(lf.LayerSelectionError, match="'conv': the logits do not depend on its output"):
        measure(PooledNet(tail=Apply(lambda x: x.detach())))


def test_features_from_a_forward_hook_are_refused_with_the_hook_named():
    net, kept = PooledNet(), []
    net.conv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    net.tail = Apply(lambda x: kept.pop())
    with pytest.raises(lf.LayerSelectionError, match="'conv': .*does not use it.*The layer has a forward hook"):
        measure(net)


def test_flattened_map_is_measured():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).double()
    report = lf.measure_flatness(net, [(X.double(), Y)])
    assert (report.layers["0"].method, report.exact) == ("gauss_newton", True)
    assert_matches_oracle(net, (X, Y), "0")


def test_smooth_pooling_by_power_is_labelled():
    # Generalised-mean pooling: one channel by itself, but its positions interact.
    class GeM(PooledNet):
        def forward(self, x):
            return self.head(self.conv(x).relu().add(0.1).pow(3).mean((2, 3)).pow(1 / 3))

    assert_not_closed_form(GeM(), "positions of one channel interact")


def test_channels_that_wake_up_later_are_learned():
    # The first batch leaves channel 0 dead; a later one does not. The tail permutes, so c(s) must be found out.
    net = PooledNet(tail=nn.Sequential(nn.ReLU(), nn.ChannelShuffle(2))).double()
    with torch.no_grad():
        net.conv.weight[0].abs_()
        net.conv.bias[0] = 0.0
    dark, bright = -X.double().abs(), X.double().abs()
    report = lf.measure_flatness(net, [(dark, Y), (bright, Y)])
    expected = oracle_block_traces(net.eval(), (torch.cat([dark, bright]), torch.cat([Y, Y])), "conv")
    assert expected[0, 0] > 0
    assert_close(report.layers["conv"].block_traces[0], expected, rtol=1e-10, atol=1e-14)


def test_a_tail_that_vanishes_at_first_is_certified_when_it_does_not():
    class Late(nn.Module):  # mixes channels only where something is positive
        def forward(self, x):
            return x.relu() * (1 + x.relu().sum((1, 2, 3), keepdim=True))

    net = PooledNet(tail=Late()).double()
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.zero_()
    batches = [(-X.double().abs(), Y), (X.double().abs(), Y)]
    layer = lf.measure_flatness(net, batches).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)
    with pytest.raises(lf.NotExactError, match="'conv'.*channels"):
        lf.measure_flatness(net, batches, strict=True)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        sigmoid = x.sigmoid()
        return gradient * sigmoid * (1 + x * (1 - sigmoid))


def test_custom_function_that_differentiates_once_is_not_exact():
    net = PooledNet(tail=Apply(OnceDifferentiable.apply))
    layer = lf.measure_flatness(net, [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)
    with pytest.raises(lf.NotExactError, match="once_differentiable"):
        measure(net)


def joined(z):
    return (z[:, :6] + z[:, 6:].roll(1, 1)).mean((2, 3))


class Between(PooledNet):
    """Applies a function to the pooled features."""

    def __init__(self, function):
        super().__init__(tail=nn.LeakyReLU())
        self.function = function

    def forward(self, x):
        z = self.tail(self.conv(x))
        return self.head(self.function(z.mean((2, 3)), z))


@guards("model/graph.py", " or may_mix(end)", "")
@pytest.mark.parametrize(
    "function",
    [
        lambda g, z: g / g.norm(dim=1, keepdim=True).clamp(min=2),
        lambda g, z: g * F.relu6(9 - z.abs().mean((2, 3))) / 6,
        lambda g, z: g + (g.roll(1, 1) - 2).relu() ** 2,
        lambda g, z: g + (z.std((2, 3)) - 4).relu(),
        lambda g, z: joined(torch.cat([z, z - 4], 1).relu() ** 2),
    ],
    ids=["clipped norm", "gate", "neighbour", "positions", "joined"],
)
def test_tails_that_mix_on_some_samples_are_noticed_on_these(function):
    net = Between(function).double().eval()
    small, large = (X.double() / 20, Y), (20 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers="conv").exact
    assert not lf.measure_flatness(net, [large], layers="conv").exact
    assert not lf.measure_flatness(net, [small, large], layers="conv").exact


def test_logits_in_another_precision_are_measured():
    net = PooledNet(after=Apply(lambda z: z.double())).eval()
    report = lf.measure_flatness(net, [(X, Y)], layers="conv")
    expected = lf.measure_flatness(PooledNet().double(), [(X.double(), Y)], layers="conv")
    assert report.exact
    assert_close(report.relative_flatness, expected.relative_flatness, rtol=1e-4, atol=0)
    assert lf.measure_lambda_max(net, [(X, Y)], layers="conv")["conv"].lambda_max > 0
