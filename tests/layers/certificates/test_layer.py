"""Layers that are not what they seem: measured with respect to the kernel they apply, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import PooledNet, X, Y, measure


class Conv2dSame(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x):
        pads = []
        for size, k, s in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((-(size // -s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StdConv2d(nn.Conv2d):
    """Standardises its weight on the fly."""

    def kernel(self):
        flat = self.weight.flatten(1)
        return ((flat - flat.mean(1, True)) / flat.std(1, keepdim=True)).view_as(self.weight)

    def forward(self, x):
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding)


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (4, 1), (3, 2), (2, 2)])
def test_convolution_that_pads_by_itself_is_measured(kernel_size, stride):
    net = PooledNet(conv=Conv2dSame(2, 6, kernel_size, stride=stride))
    assert_matches_oracle(net, (X, Y), "conv")
    assert measure(net).layers["conv"].info.kernel == "parameter"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("kernel_size", "dilation"), [(4, 1), (2, 3), ((2, 3), (1, 2))])
def test_uneven_same_padding_is_measured(kernel_size, dilation):
    net = PooledNet(conv=nn.Conv2d(2, 6, kernel_size, padding="same", dilation=dilation))
    assert_matches_oracle(net, (X, Y), "conv")


def test_standardised_kernel_is_measured_as_applied_and_said_so():
    conv = StdConv2d(2, 6, 3)
    report = measure(PooledNet(conv=conv))
    assert report.layers["conv"].info.kernel == "effective"
    plain = nn.Conv2d(2, 6, 3).double()
    plain.load_state_dict({"weight": conv.kernel(), "bias": conv.bias})
    net = PooledNet()
    net.load_state_dict(PooledNet(conv=conv).state_dict())
    net.conv = plain
    assert_close(report.layers["conv"].block_traces, measure(net).layers["conv"].block_traces)
    assert_matches_oracle(net, (X, Y), "conv")


@guards("testing.py", "module.__class__ = type(kind.__name__, kind.__bases__, own)", "pass")
@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_kernel_is_measured_as_applied_and_said_so(parametrize):
    net = PooledNet(conv=parametrize(nn.Conv2d(2, 6, 3))).eval()
    assert measure(net).layers["conv"].info.kernel == "effective"
    before = net(X.double())
    assert_matches_oracle(net, (X, Y), "conv")
    assert torch.equal(net(X.double()), before), "the check has taken the parametrisation of the user's module away"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_style_weight_norm_is_measured_as_applied():
    net = PooledNet(conv=nn.utils.weight_norm(nn.Conv2d(2, 6, 3)))
    plain = PooledNet()
    plain.conv.load_state_dict({"weight": net.conv.weight.detach(), "bias": net.conv.bias})
    plain.head.load_state_dict(net.head.state_dict())
    report = measure(net)
    assert report.layers["conv"].info.kernel == "effective"
    assert_close(report.layers["conv"].block_traces, measure(plain).layers["conv"].block_traces)


def test_layer_that_does_more_than_convolve_is_refused():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(lf.LayerSelectionError, match=r"'conv': it \(Scaled\) does not return the output of its"):
        measure(PooledNet(conv=Scaled(2, 6, 3)))


def test_a_layer_of_complex_numbers_is_left_out():
    class Complex(PooledNet):
        def forward(self, x):
            return super().forward(self.first(x.to(torch.complex128)).abs())

    net = Complex(nn.Conv2d(3, 6, 3)).double()
    net.first = nn.Conv2d(2, 3, 1, dtype=torch.complex128)
    report, expected = (lf.measure_flatness(net, [(X.double(), Y)], layers=of) for of in ("all", ["conv", "head"]))
    assert "'first': its weights are complex numbers" in report.left_out["first"]
    assert list(report.layers) == ["conv", "head"]
    assert report.relative_flatness == expected.relative_flatness


class Gated(PooledNet):
    """Multiplies the features by a gate of a vector that has no batch dimension."""

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)) * self.gate(self.prompt))


def test_a_layer_of_an_input_without_a_batch_dimension_is_left_out():
    net = Gated().double()
    net.gate, net.prompt = nn.Linear(7, 6).double(), torch.randn(7).double()
    for measured in (lf.measure_flatness, lf.measure_lambda_max):
        assert list(measured(net, [(X.double(), Y)], layers="all").layers) == ["conv", "head"]
    report = lf.measure_flatness(net, [(X.double(), Y)], layers="all")
    assert "'gate': it runs on an input without a batch dimension" in report.left_out["gate"]
    assert_matches_oracle(net, (X, Y), "conv")


def test_layer_of_two_convolutions_is_refused():
    class Adapted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + F.conv2d(x, 0.1 * self.weight)

    with pytest.raises(lf.LayerSelectionError, match=r"'conv': it \(Adapted\) runs 2 convolutions"):
        measure(PooledNet(conv=Adapted(2, 6, 3)))


def test_layer_that_holds_another_is_refused_and_leaves_no_mode_behind():
    class Adapted(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.down = nn.Conv2d(2, 6, 3)

        def forward(self, x):
            return super().forward(x) + self.down(x)

    before = torch._C._len_torch_function_stack()
    net = PooledNet(conv=Adapted(2, 6, 3))
    with pytest.raises(lf.LayerSelectionError, match=r"'conv': it \(Adapted\) runs 2"):
        lf.measure_flatness(net, [(X, Y)], layers=["conv", "conv.down"])
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert set(report.layers) == {"conv.down", "head"}
    assert "runs 2 convolutions" in report.left_out["conv"]
    assert "Left out: Layer 'conv': it (Adapted) runs 2" in " ".join(str(report).split())
    assert torch._C._len_torch_function_stack() == before


def test_convolution_that_is_called_by_keyword_is_measured():
    class Keyword(PooledNet):
        def forward(self, x):
            return self.head(input=self.conv(input=x).relu()).relu().mean((2, 3))

    net = Keyword(head=nn.Conv2d(6, 4, 1)).double()
    assert list(lf.measure_flatness(net, [(X.double(), Y)]).layers) == ["head"]


def test_hook_that_changes_the_output_is_refused():
    net = PooledNet()
    net.conv.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(lf.LayerSelectionError, match="a hook changes the output"):
        measure(net)


class DoubledConv2d(StdConv2d):
    """Doubles its output in place."""

    def forward(self, x):
        return super().forward(x).mul_(2)


class ClampedConv2d(nn.Conv2d):
    """Clamps its output in place, which changes only large outputs."""

    def forward(self, x):
        return super().forward(x).clamp_(-3, 3)


def hooked():
    """Return a convolution with a computed kernel, and with a hook that triples the output in place."""
    conv = parametrizations.weight_norm(nn.Conv2d(2, 6, 3))
    conv.register_forward_hook(lambda module, args, out: out.mul_(3))
    return conv


@guards("layers/certificates/layer.py", "call.has_changed_output or ", "")
@pytest.mark.parametrize("make", [lambda: DoubledConv2d(2, 6, 3), lambda: ClampedConv2d(2, 6, 3), hooked])
@pytest.mark.parametrize("layers", ["conv", "all"])
def test_a_layer_that_changes_its_output_in_place_is_refused(make, layers):
    net = PooledNet(conv=make()).double().eval()
    try:
        reason = lf.measure_flatness(net, [(X.double(), Y)], layers=layers).left_out["conv"]
    except lf.LayerSelectionError as error:
        reason = str(error)
    assert "forward or a hook changes the output" in reason


class CosineHead(nn.Linear):
    """Multiplies cosines by ten, in place."""

    def forward(self, x):
        out = F.linear(F.normalize(x), F.normalize(self.weight))
        out *= 10
        return out


@pytest.mark.parametrize("layers", ["classifier", "head"])
def test_a_classifier_that_scales_its_output_in_place_is_refused(layers):
    with pytest.raises(lf.LayerSelectionError, match="changes the output"):
        lf.measure_flatness(PooledNet(head=CosineHead(6, 4)), [(X, Y)], layers=layers)


class OfInput(nn.Linear):
    """A kernel that depends on the input."""

    def forward(self, x):
        return F.linear(x, self.weight * (3.0 if x.mean() > 0.5 else 1.0))


def test_a_kernel_that_depends_on_the_input():
    net = linear_net()
    net.a = OfInput(6, 5).double()
    with pytest.raises(lf.LayerSelectionError, match="'a': its kernel differs from one call to the next"):
        lf.measure_flatness(net, [(VECTORS - 1, LABELS), (VECTORS + 1, LABELS)], layers="a")


def test_rows_that_are_routed_in_a_later_batch_only():
    def forward(net, x):
        h = torch.zeros_like(x[:, :5])
        chosen = x[:, 0] > 0
        h[chosen] = net.a(x[chosen]).relu()
        h[~chosen] = net.b(x[~chosen]).relu()
        return net.c(h)

    first, later = VECTORS.clone(), VECTORS.clone()
    first[:, 0] = 1.0
    with pytest.raises(lf.LayerSelectionError, match="'a': it runs on some samples of this batch only"):
        lf.measure_flatness(linear_net(forward), [(first, LABELS), (later, LABELS)], layers="a")
