"""What must stay the same, on whole networks (mathematics, section 4)."""

import copy
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
from tests.networks import randomise_statistics

X = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(10) % 4
ALPHA = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
SCALARS = ("hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness", "weight_norm")


class Net(nn.Module):
    def __init__(self, activation=None, norm=False, groups=1):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(2, 4, 1)
        self.conv = nn.Conv2d(4, 6, 3, groups=groups)
        self.norm = nn.BatchNorm2d(6, eps=1e-30) if norm else nn.Identity()
        self.activation = activation or nn.ReLU()
        self.head = nn.Linear(6, 4)
        randomise_statistics(self).double().eval()

    def forward(self, x):
        return self.head(self.activation(self.norm(self.conv(torch.tanh(self.stem(x))))).mean((2, 3)))


def measure(net, batches=((X, Y),), **kwargs):
    (layer,) = lf.measure_flatness(net, batches, **kwargs).layers.values()
    return layer


def assert_same(actual, expected, names=SCALARS):
    for name in names:
        assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=1e-10), name


def assert_traces_close(actual, expected):
    assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def rescaled(net, alpha):
    """Every filter times its ``alpha``, undone where the network reads it."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.conv.weight.mul_(alpha[:, None, None, None])
        net.conv.bias.mul_(alpha)
        if isinstance(net.norm, nn.BatchNorm2d):
            net.norm.running_mean.mul_(alpha)
            net.norm.running_var.mul_(alpha**2)
        else:
            net.head.weight.div_(alpha)
    return net


# ----------------------------------------------------------------------------------------------------------- rescaling


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(6), nn.Identity()])
@pytest.mark.parametrize("groups", [1, 2])
def test_rescaled_filters_leave_relative_flatness(activation, groups):
    net = Net(activation, groups=groups)
    other = rescaled(net, ALPHA)
    assert_close(other(X), net(X), rtol=1e-12, atol=1e-12)
    before, after = measure(net), measure(other)
    assert_same(after, before, ["relative_flatness", "neuronwise_flatness"])
    assert_close(after.filter_flatness, before.filter_flatness, rtol=1e-10, atol=0)
    assert_close(after.filter_traces, before.filter_traces / ALPHA**2, rtol=1e-10, atol=0)
    assert after.hessian_trace != pytest.approx(before.hessian_trace, rel=0.1)


@pytest.mark.parametrize("alpha", [0.1, 10.0])
def test_a_rescaled_layer_leaves_all_flatness(alpha):
    net = Net()
    other = rescaled(net, torch.full((6,), alpha).double())
    assert_close(other(X), net(X), rtol=1e-12, atol=1e-12)
    before, after = measure(net), measure(other)
    assert_same(after, before, ["relative_flatness", "neuronwise_flatness", "layerwise_flatness"])
    assert after.hessian_trace == pytest.approx(before.hessian_trace / alpha**2)
    assert after.weight_norm == pytest.approx(before.weight_norm * alpha)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_rescaled_filters_before_batch_norm_leave_relative_flatness(activation):
    net = Net(activation, norm=True)
    other = rescaled(net, ALPHA)
    assert_close(other(X), net(X), rtol=1e-12, atol=1e-12)
    before, after = measure(net), measure(other)
    assert_same(after, before, ["relative_flatness", "neuronwise_flatness"])
    assert_close(after.filter_traces, before.filter_traces / ALPHA**2, rtol=1e-10, atol=0)


def test_rescaled_filters_under_a_curved_activation_are_another_function():
    # The rescaling is no symmetry here, so this shows that the tests above can fail.
    net = Net(nn.SiLU())
    other = rescaled(net, ALPHA)
    assert not torch.allclose(other(X), net(X), rtol=1e-3)
    assert measure(other).relative_flatness != pytest.approx(measure(net).relative_flatness, rel=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_a_common_part_of_the_logits_does_not_matter(activation):
    net = Net(activation)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight.add_(torch.randn(6).double())
        other.head.bias.add_(3.0)
    assert_same(measure(other), measure(net))


# --------------------------------------------------------------------------------------------------------- permutation


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_permuted_filters_permute_the_traces(activation):
    net = Net(activation, norm=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = copy.deepcopy(net)
    with torch.no_grad():
        for module, names in ((other.conv, ("weight", "bias")), (other.norm, ("weight", "bias", "running_mean"))):
            for name in names:
                getattr(module, name).copy_(getattr(module, name)[order])
        other.norm.running_var.copy_(other.norm.running_var[order])
        other.head.weight.copy_(other.head.weight[:, order])
    assert_close(other(X), net(X), rtol=1e-12, atol=1e-12)
    before, after = measure(net), measure(other)
    assert_traces_close(after.block_traces, before.block_traces[:, order][:, :, order])
    assert_traces_close(after.filter_traces, before.filter_traces[order])
    assert_same(after, before)


def test_permuted_samples_and_classes_do_not_matter():
    net = Net(nn.SiLU())
    samples, classes = torch.randperm(10), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight[classes])
        other.head.bias.copy_(other.head.bias[classes])
    actual = measure(other, [(X[samples], classes.argsort()[Y[samples]])])
    assert_traces_close(actual.block_traces, measure(net).block_traces)


# -------------------------------------------------------------------------------------------------------------- splits


@given(sizes=st.lists(st.integers(1, 9), max_size=10), curved=st.booleans())
@settings(max_examples=10)
def test_any_split_over_batches_equals_the_whole(sizes, curved):
    assert_any_split_is_the_whole(sizes, curved)


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 9), max_size=10), curved=st.booleans())
def test_many_more_splits_over_batches_equal_the_whole(sizes, curved):
    assert_any_split_is_the_whole(sizes, curved)


def assert_any_split_is_the_whole(sizes, curved):
    net = Net(nn.SiLU() if curved else nn.ReLU())
    cuts = [0, *(cut for cut in accumulate(sizes) if cut < 10), 10]
    batches = [(X[a:b], Y[a:b]) for a, b in pairwise(cuts)]
    assert_split_is_the_whole(net, batches)


@pytest.mark.parametrize("sizes", [(7, 3), (1, 9), (9, 1), (1,) * 10], ids=str)
@pytest.mark.parametrize(
    "net", [Net(), Net(nn.SiLU()), Net(nn.SiLU(), norm=True, groups=2)], ids=["relu", "silu", "groups"]
)
def test_unequal_batches_equal_the_whole(net, sizes):
    assert_split_is_the_whole(net, list(zip(X.split(sizes), Y.split(sizes), strict=True)))


def assert_split_is_the_whole(net, batches):
    actual, whole = measure(net, batches), measure(net)
    assert actual.num_samples == 10
    assert_traces_close(actual.block_traces, whole.block_traces)
    assert_same(actual, whole)


def test_repeated_samples_do_not_matter():
    net = Net(nn.SiLU())
    assert_traces_close(measure(net, [(X, Y), (X, Y)]).block_traces, measure(net).block_traces)


# ---------------------------------------------------------------------------------------------- layers known otherwise


class OnePixel(nn.Module):
    """The same function of a vector, as a convolution of a 1x1 map and as a linear layer."""

    def __init__(self, linear, kernel_size=1):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.kernel_size = linear, kernel_size
        self.layer = nn.Linear(5 * kernel_size**2, 6) if linear else nn.Conv2d(5, 6, kernel_size)
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, x):
        z = self.layer(x.flatten(1)) if self.linear else self.layer(x).flatten(1)
        return self.head(torch.nn.functional.silu(z))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_convolution_with_one_output_pixel_is_a_linear_layer(kernel_size):
    linear, convolution = OnePixel(True, kernel_size), OnePixel(False, kernel_size)
    with torch.no_grad():
        convolution.layer.weight.copy_(linear.layer.weight.view_as(convolution.layer.weight))
        convolution.layer.bias.copy_(linear.layer.bias)
        convolution.head.load_state_dict(linear.head.state_dict())
    x, y = torch.randn(4, 5, kernel_size, kernel_size).double(), torch.tensor([0, 1, 2, 3])

    def loss(weight):
        return cross_entropy(torch.func.functional_call(linear, {"layer.weight": weight}, (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, linear.layer.weight.detach())
    actual = measure(convolution, [(x, y)])
    assert_traces_close(actual.block_traces[0], torch.einsum("sdtd->st", hessian))
    assert actual.hessian_trace == pytest.approx(float(torch.einsum("sdsd->", hessian)), rel=1e-10)


def test_pooled_maps_as_logits_follow_the_classifiers_formula():
    # Without a classifier the convolution itself is one, on the mean patch: T = E |phi|² (diag(π) - π πᵀ).
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    phi = torch.nn.functional.unfold(X, 3).mean(2)
    pi = net(X).softmax(1)
    each = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    expected = (phi.square().sum(1)[:, None, None] * each).mean(0).detach()
    actual = measure(net)
    assert actual.info.classifier is None
    assert_traces_close(actual.block_traces[0], expected)
    # Every row of T adds up to zero: a number added to all logits changes nothing.
    assert_close(actual.block_traces[0].sum(1), torch.zeros(4).double(), rtol=0, atol=1e-14)


def test_an_identity_classifier_changes_nothing():
    # The head of SqueezeNet: a 1x1 convolution, ReLU, pooling; against the same with a linear identity after it.
    torch.manual_seed(3)
    bare = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    identity = nn.Linear(4, 4, bias=False).double()
    nn.init.eye_(identity.weight)
    actual, expected = measure(bare), measure(nn.Sequential(*bare, identity))
    assert (actual.info.classifier, expected.info.classifier) == (None, "4")
    assert_traces_close(actual.block_traces, expected.block_traces)
    assert_same(actual, expected)


@guards("model/isolation.py", "module.training = False", "pass")
def test_dropout_and_training_flags_do_not_matter():
    plain = Net(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), norm=True)
    assert_same(measure(copy.deepcopy(plain).train()), measure(plain))


def test_a_frozen_network_measures_the_same():
    net = Net(nn.SiLU(), norm=True)
    assert_same(measure(copy.deepcopy(net).requires_grad_(False)), measure(net))


def test_a_sample_alone_where_batch_norm_has_a_wrong_backward_pass():
    # On a CPU the gradient that arrives at the normalisation here, for one sample, has strides that torch takes wrong.
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            t = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            return self.head((t + self.fc(t).relu()).mean(1))

    net = randomise_statistics(Tokens()).double().eval()
    x, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 3])
    together = lf.measure_flatness(net, [(x, y)], layers="conv")
    alone = lf.measure_flatness(net, [(x[:1], y[:1]), (x[1:], y[1:])], layers="conv")
    assert_close(alone.layers["conv"].block_traces, together.layers["conv"].block_traces, rtol=1e-11, atol=1e-14)
