"""Heads, tails and layers that are not what they seem: the right number with its label, or a refusal that says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.jacobians import jacobian_block_traces

X, Y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 1])


class Net(nn.Module):
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


# ---------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    "after",
    [
        lambda f: f / 1.5,  # temperature
        lambda f: 3 * torch.tanh(f / 3),  # soft cap
        lambda f: f + torch.tensor([0.5, 0.0, 0.0, 0.0]),  # class priors
        lambda f: f.masked_fill(torch.tensor([False, True, False, False]), -1e4),  # masked classes
        lambda f: f.clamp(-0.1, 0.1),
    ],
    ids=["temperature", "soft cap", "priors", "masked", "clamped"],
)
def test_changed_logits_are_noticed(after):
    assert_not_closed_form(Net(after=Apply(after)), "output is not that of its classifier 'head'.*temperature")


@pytest.mark.parametrize("after", [lambda f: f / 1.5, lambda f: f + torch.tensor([0.5, 0.0, 0.0, 0.0])])
def test_affine_changes_of_logits_of_relu_networks_are_exact(after):
    assert_not_closed_form(Net(tail=nn.ReLU(), after=Apply(after)), "", exact=True)


def test_softmax_before_the_loss_is_noticed_by_name():
    assert_not_closed_form(Net(after=nn.Softmax(dim=1)), "returns probabilities")


def test_classes_masked_with_infinity_are_refused():
    mask = torch.tensor([False, True, False, False])
    with pytest.raises(lf.BatchError, match="masked with -inf"):
        measure(Net(after=Apply(lambda f: f.masked_fill(mask, -torch.inf))))


@pytest.mark.parametrize(
    "after", [nn.LogSoftmax(dim=1), Apply(lambda f: f + 7 * f.sum(1, keepdim=True))], ids=["log-softmax", "shift"]
)
def test_shifted_logits_are_measured(after):
    assert_matches_oracle(Net(after=after), (X, Y), "conv")


class CosineClassifier(nn.Linear):
    def forward(self, x):
        return 5 * F.linear(F.normalize(x), F.normalize(self.weight))


def test_cosine_classifier_is_noticed():
    assert_not_closed_form(Net(head=CosineClassifier(6, 4)), "classifier 'head' does not return weight @ input")


def test_weight_normed_classifier_is_measured():
    assert_matches_oracle(Net(head=parametrizations.weight_norm(nn.Linear(6, 4))), (X, Y), "conv")


def test_frozen_classifier_without_bias_is_measured():
    assert_matches_oracle(Net(head=nn.Linear(6, 4, bias=False)).requires_grad_(False), (X, Y), "conv")


class ConvolutionClassifier(nn.Module):
    def __init__(self, pool_first):
        super().__init__()
        self.conv, self.head, self.pool_first = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 1), pool_first

    def forward(self, x):
        x = F.silu(self.conv(x))
        if self.pool_first:
            return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)
        return self.head(x).relu().mean((2, 3))


def test_1x1_convolution_after_the_pooling_is_a_classifier():
    net = ConvolutionClassifier(pool_first=True)
    assert list(measure(net).layers) == ["conv"]
    assert_matches_oracle(net, (X, Y), "conv")


def test_1x1_convolution_before_the_pooling_is_the_layer():
    net = ConvolutionClassifier(pool_first=False)
    report = measure(net)
    assert list(report.layers) == ["head"]
    assert report.layers["head"].info.classifier is None
    assert_matches_oracle(net, (X, Y), "head")


def test_two_linear_layers_are_noticed():
    head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    assert_not_closed_form(Net(head=head), "'conv': between this layer and the classifier the channels")
    head[1] = nn.LeakyReLU()
    assert_not_closed_form(Net(tail=nn.ReLU(), head=head), "", exact=True)


def test_functional_classifier_is_noticed():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x @ self.weight.T

    assert_not_closed_form(Net(head=Functional()), "'conv'.*channels")


def test_skip_around_the_classifier_is_noticed():
    class Bypass(Net):
        def forward(self, x):
            g = self.tail(self.conv(x)).mean((2, 3))
            return self.head(g) + g[:, :4]

    assert_not_closed_form(Bypass(), "output is not that of its classifier")


# ---------------------------------------------------------------------------------------------------------------- tail


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
    assert_matches_oracle(Net(tail=tail), (X, Y), "conv")


def test_layer_under_a_depthwise_convolution_is_measured():
    # It acts on every channel by itself; only "last" would choose the depthwise convolution.
    tail = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 2, groups=6))
    assert_matches_oracle(Net(tail=tail), (X, Y), "conv")
    assert_matches_oracle(Net(tail=tail), (X, Y), "tail.1")


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
    assert_not_closed_form(Net(tail=tail), f"'conv'.*{reason}")


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
    assert_not_closed_form(Net(tail=tail), "", exact=True)


def test_samples_that_mix_are_refused():
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*one sample depend on other samples"):
        measure(Net(tail=nn.BatchNorm2d(6, track_running_stats=False)))


def assert_noticed(tail, num_batches):
    """A tail that mixes channels where the inputs are large, as they are in all batches but the first."""
    net = Net(tail=Apply(tail)).double()
    batches = [(X.double(), Y)] + [(10 + X.double(), Y)] * num_batches
    assert lf.measure_flatness(net, batches[:1], layers="conv").layers["conv"].method == "closed_form"
    layer = lf.measure_flatness(net, batches, layers="conv").layers["conv"]
    assert layer.method == "gauss_newton"
    assert not layer.exact


def test_a_tail_that_becomes_another_is_certified_anew():
    assert_noticed(lambda x: F.silu(x.cumsum(1) if x.detach().abs().mean() > 2 else x), 1)


def test_channels_that_are_moved_by_indices():
    def tail(x):
        # Where inputs are large, every channel is joined by the second one, and else by nothing.
        others = torch.tensor([1, 6])[(x.detach().abs().mean() > 2).long().neg() + 1].expand(6)
        return F.silu(x + F.pad(x, (0, 0, 0, 0, 0, 1))[:, others])

    assert_noticed(tail, 1)


def test_a_tail_is_certified_in_full_again_and_again():
    """The same operations with the same constants; only what they are multiplied with is another."""

    def tail(x):
        mixes = (x.detach().abs().mean() > 2).to(x)
        return F.silu((1 - mixes) * x + mixes * x.cumsum(1))

    assert_noticed(tail, 16)
    with pytest.raises(AssertionError):  # between two full certificates it is not seen
        assert_noticed(tail, 3)


def test_detached_layer_is_refused():
    with pytest.raises(lf.LayerSelectionError, match="'conv': the logits do not depend on its output"):
        measure(Net(tail=Apply(lambda x: x.detach())))


def test_flattened_map_is_measured():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).double()
    report = lf.measure_flatness(net, [(X.double(), Y)])
    assert (report.layers["0"].method, report.exact) == ("gauss_newton", True)
    assert_matches_oracle(net, (X, Y), "0")


def test_smooth_pooling_by_power_is_labelled():
    # Generalised-mean pooling: one channel by itself, but its positions interact.
    class GeM(Net):
        def forward(self, x):
            return self.head(self.conv(x).relu().add(0.1).pow(3).mean((2, 3)).pow(1 / 3))

    assert_not_closed_form(GeM(), "positions of one channel interact")


def test_channels_that_wake_up_later_are_learned():
    # The first batch leaves channel 0 dead; a later one does not. The tail permutes, so c(s) must be found out.
    net = Net(tail=nn.Sequential(nn.ReLU(), nn.ChannelShuffle(2))).double()
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

    net = Net(tail=Late()).double()
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.zero_()
    batches = [(-X.double().abs(), Y), (X.double().abs(), Y)]
    layer = lf.measure_flatness(net, batches).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)
    with pytest.raises(lf.NotExactError, match="'conv'.*channels"):
        lf.measure_flatness(net, batches, strict=True)


def test_logits_that_are_clamped_later_are_noticed_then():
    net = Net(after=Apply(lambda f: f.clamp(-0.6, 0.6))).double().eval()
    small, large = X.double() / 10, 4 * X.double()
    assert lf.measure_flatness(net, [(small, Y)]).layers["conv"].method == "closed_form"
    layer = lf.measure_flatness(net, [(small, Y), (large, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


def test_samples_that_mix_are_noticed_after_a_first_batch_of_one():
    net = Net(tail=Apply(lambda x: x - 0.5 * x.mean(0, keepdim=True))).double()
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*depend on other samples"):
        lf.measure_flatness(net, [(X[:1].double(), Y[:1]), (X.double(), Y)], strict=True)


@pytest.mark.parametrize("layers", ["conv", "head"])
def test_samples_that_mix_in_a_later_batch_are_noticed_then(layers):
    class Late(Net):
        def forward(self, x):
            logits = super().forward(x)
            return logits + (logits.mean(0, keepdim=True).abs() - 2).relu()

    net = Late(tail=nn.ReLU()).double()
    small, large = (X.double() / 10, Y), (50 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers=layers).exact
    with pytest.raises(lf.LayerSelectionError, match="depend on other samples"):
        lf.measure_flatness(net, [small, large], layers=layers)


@pytest.mark.parametrize(
    "after", [lambda f: f * (1 + 3e-5), lambda f: 10 * torch.tanh(f / 10)], ids=["temperature", "soft cap"]
)
def test_slight_changes_of_logits_are_noticed_in_float32(after):
    layer = lf.measure_flatness(Net(after=Apply(after)), [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


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
    net = Net(tail=Apply(OnceDifferentiable.apply))
    layer = lf.measure_flatness(net, [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)
    with pytest.raises(lf.NotExactError, match="once_differentiable"):
        measure(net)


class HalvesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def test_what_changes_gradients_after_the_head_is_noticed():
    layer = lf.measure_flatness(Net(after=Apply(HalvesGradients.apply)), [(X, Y)]).layers["conv"]
    assert layer.method == "gauss_newton"
    with pytest.raises(lf.NotExactError, match="changes gradients and no values"):
        measure(Net(after=Apply(HalvesGradients.apply)))


def test_curvature_that_first_shows_in_a_later_batch_is_labelled():
    net = Net(tail=nn.ReLU(), after=Apply(lambda f: f + F.relu(f - 2) ** 2)).double()
    small, large = (X.double() / 10, Y), (30 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers="head").exact
    assert not lf.measure_flatness(net, [large], layers="head").exact
    assert not lf.measure_flatness(net, [small, large], layers="head").exact
    with pytest.raises(lf.NotExactError, match="'head'"):
        lf.measure_flatness(net, [small, large], layers="head", strict=True)


def test_later_failure_of_the_closed_form_says_what_is_in_the_sum():
    net = Net(after=Apply(lambda f: f.clamp(-0.6, 0.6))).double()
    layer = lf.measure_flatness(net, [(X.double() / 10, Y), (4 * X.double(), Y)]).layers["conv"]
    assert "for some samples; others may count with all their Hessian" in layer.info.reason


def test_forward_that_writes_to_a_weight_after_a_measured_layer():
    class Clip(nn.Conv2d):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    net = Net(conv=nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), Clip(3, 6, 2)), tail=nn.ReLU())
    assert lf.measure_flatness(net.double(), [(X.double(), Y)], layers="all").exact


def test_autocast_inside_the_forward_is_refused_by_name():
    class Autocast(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    for layers in ("last", "classifier", "all"):
        with pytest.raises(lf.BatchError, match="torch.autocast inside the model's forward"):
            lf.measure_flatness(Autocast(), [(X, Y)], layers=layers)


def test_gradient_checkpointing_is_refused_with_a_remedy():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(lambda x: self.tail(self.conv(x)), x, use_reentrant=False).mean((2, 3)))

    with pytest.raises(lf.LayerSelectionError, match="gradient checkpointing.*if self.training"):
        measure(Checkpointed())


# --------------------------------------------------------------------------------------------------------------- layer


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
    net = Net(conv=Conv2dSame(2, 6, kernel_size, stride=stride))
    assert_matches_oracle(net, (X, Y), "conv")
    assert measure(net).layers["conv"].info.kernel == "parameter"


@pytest.mark.parametrize(("kernel_size", "dilation"), [(4, 1), (2, 3), ((2, 3), (1, 2))])
def test_uneven_same_padding_is_measured(kernel_size, dilation):
    net = Net(conv=nn.Conv2d(2, 6, kernel_size, padding="same", dilation=dilation))
    assert_matches_oracle(net, (X, Y), "conv")


def test_standardised_kernel_is_measured_as_applied_and_said_so():
    conv = StdConv2d(2, 6, 3)
    report = measure(Net(conv=conv))
    assert report.layers["conv"].info.kernel == "effective"
    plain = nn.Conv2d(2, 6, 3).double()
    plain.load_state_dict({"weight": conv.kernel(), "bias": conv.bias})
    net = Net()
    net.load_state_dict(Net(conv=conv).state_dict())
    net.conv = plain
    assert_close(report.layers["conv"].block_traces, measure(net).layers["conv"].block_traces)
    assert_matches_oracle(net, (X, Y), "conv")


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_kernel_is_measured_as_applied_and_said_so(parametrize):
    net = Net(conv=parametrize(nn.Conv2d(2, 6, 3)))
    assert measure(net).layers["conv"].info.kernel == "effective"
    assert_matches_oracle(net, (X, Y), "conv")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_style_weight_norm_is_measured_as_applied():
    net = Net(conv=nn.utils.weight_norm(nn.Conv2d(2, 6, 3)))
    plain = Net()
    plain.conv.load_state_dict({"weight": net.conv.weight.detach(), "bias": net.conv.bias})
    plain.head.load_state_dict(net.head.state_dict())
    report = measure(net)
    assert report.layers["conv"].info.kernel == "effective"
    assert_close(report.layers["conv"].block_traces, measure(plain).layers["conv"].block_traces)


def test_layer_that_does_more_than_convolve_is_refused():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(lf.LayerSelectionError, match=r"'conv' \(Scaled\): its output is not that of its convolution"):
        measure(Net(conv=Scaled(2, 6, 3)))


def test_layer_of_two_convolutions_is_refused():
    class Adapted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + F.conv2d(x, 0.1 * self.weight)

    with pytest.raises(lf.LayerSelectionError, match=r"'conv' \(Adapted\) runs 2 convolutions"):
        measure(Net(conv=Adapted(2, 6, 3)))


def test_layer_that_holds_another_is_refused_and_leaves_no_mode_behind():
    class Adapted(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.down = nn.Conv2d(2, 6, 3)

        def forward(self, x):
            return super().forward(x) + self.down(x)

    before = torch._C._len_torch_function_stack()
    net = Net(conv=Adapted(2, 6, 3))
    with pytest.raises(lf.LayerSelectionError, match=r"'conv' \(Adapted\) runs 2"):
        lf.measure_flatness(net, [(X, Y)], layers=["conv", "conv.down"])
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert set(report.layers) == {"conv.down", "head"}
    assert "runs 2 convolutions" in report.left_out["conv"]
    assert "Left out: Layer 'conv' (Adapted) runs 2" in " ".join(str(report).split())
    assert torch._C._len_torch_function_stack() == before


def test_convolution_that_is_called_by_keyword_is_measured():
    class Keyword(Net):
        def forward(self, x):
            return self.head(input=self.conv(input=x).relu()).relu().mean((2, 3))

    net = Keyword(head=nn.Conv2d(6, 4, 1)).double()
    assert list(lf.measure_flatness(net, [(X.double(), Y)]).layers) == ["head"]


def test_hook_that_changes_the_output_is_refused():
    net = Net()
    net.conv.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(lf.LayerSelectionError, match="a hook changes it"):
        measure(net)


def test_shared_weight_is_refused():
    net = Net(conv=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3)), head=nn.Linear(2, 4))
    assert_matches_oracle(net, (X, Y), "conv.2")
    net.conv[2].weight = net.conv[0].weight
    with pytest.raises(lf.LayerSelectionError, match=r"'conv.2'.*shared with another layer"):
        measure(net)


def test_weight_used_again_in_the_forward_is_refused():
    class Again(Net):
        def forward(self, x):
            return super().forward(x + F.pad(F.conv2d(x, self.conv.weight[:2]), (1, 1, 1, 1)))

    with pytest.raises(lf.LayerSelectionError, match="used again in the forward"):
        measure(Again())


def test_layer_used_twice_is_measured():
    class Twice(Net):
        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)) + self.conv(x.flip(3)).relu().mean((2, 3)))

    assert_not_closed_form(Twice(), "", exact=True)


def test_noise_in_the_forward_is_refused():
    with pytest.raises(lf.LayerSelectionError, match="different logits in evaluation mode"):
        measure(Net(tail=Apply(lambda x: F.dropout(x, 0.5))))


def test_layer_inside_a_no_grad_block_is_refused_with_a_remedy():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                x = self.conv(x)
            return self.head(self.tail(x).mean((2, 3)))

    with pytest.raises(lf.LayerSelectionError, match=r"'conv' runs under torch.no_grad\(\).*requires_grad_\(False\)"):
        measure(Frozen())


def test_frozen_layer_is_measured():
    assert_matches_oracle(Net().requires_grad_(False), (X, Y), "conv")
