"""Heads that are not what they seem: the right number with its label, or a refusal that says why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle
from tests.guarding import guards
from tests.layers.pooled_net import Apply, PooledNet, X, Y, assert_not_closed_form, measure


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
    assert_not_closed_form(PooledNet(after=Apply(after)), "'head': the model does not return the output.*temperature")


@pytest.mark.parametrize("after", [lambda f: f / 1.5, lambda f: f + torch.tensor([0.5, 0.0, 0.0, 0.0])])
def test_affine_changes_of_logits_of_relu_networks_are_exact(after):
    assert_not_closed_form(PooledNet(tail=nn.ReLU(), after=Apply(after)), "", exact=True)


@pytest.mark.filterwarnings("ignore:The model returns probabilities")
def test_softmax_before_the_loss_is_noticed_by_name():
    assert_not_closed_form(PooledNet(after=nn.Softmax(dim=1)), "returns probabilities")


def test_classes_masked_with_infinity_are_refused():
    mask = torch.tensor([False, True, False, False])
    with pytest.raises(lf.BatchError, match="masks classes with -inf"):
        measure(PooledNet(after=Apply(lambda f: f.masked_fill(mask, -torch.inf))))


@pytest.mark.parametrize(
    "after", [nn.LogSoftmax(dim=1), Apply(lambda f: f + 7 * f.sum(1, keepdim=True))], ids=["log-softmax", "shift"]
)
def test_shifted_logits_are_measured(after):
    assert_matches_oracle(PooledNet(after=after), (X, Y), "conv")


class CosineClassifier(nn.Linear):
    def forward(self, x):
        return 5 * F.linear(F.normalize(x), F.normalize(self.weight))


def test_cosine_classifier_is_noticed():
    assert_not_closed_form(PooledNet(head=CosineClassifier(6, 4)), "'head': it does not return weight @ input")


def test_weight_normed_classifier_is_measured():
    assert_matches_oracle(PooledNet(head=parametrizations.weight_norm(nn.Linear(6, 4))), (X, Y), "conv")


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_normed_classifier_is_measured_in_another_precision(norm):
    assert lf.measure_flatness(PooledNet(head=norm(nn.Linear(6, 4))), [(X, Y)], dtype="float64", strict=True).exact


class Remembers(nn.Module):
    """Counts how often the weight is computed, and draws numbers that do not matter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight + 0 * torch.randn_like(weight)


@guards("layers/recording.py", "module._parameters.get(name) for name", "getattr(module, name) for name")
def test_a_classifier_whose_weight_is_computed_leaves_no_trace():
    """A user's call leaves the same, whether it is observed or not."""
    net = PooledNet(head=register_parametrization(nn.Linear(6, 4), "weight", Remembers())).eval()
    twin, state = copy.deepcopy(net), torch.get_rng_state()
    expected = lf.measure_flatness(net, [(X, Y)]).layers["conv"].block_traces[0]
    observer = lf.FlatnessObserver(net)
    with torch.inference_mode():
        assert observer.why_not_live(X, Y) == ""
        with observer.listen(X) as heard:
            net(X)
    observed = observer.observed(heard, Y)["conv"].block_traces
    assert_close(observed[0] / len(X), expected, rtol=1e-4, atol=1e-7)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    twin(X)
    assert torch.equal(drawn, torch.get_rng_state())
    assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_frozen_classifier_without_bias_is_measured():
    assert_matches_oracle(PooledNet(head=nn.Linear(6, 4, bias=False)).requires_grad_(False), (X, Y), "conv")


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


@guards("layers/certificates/head.py", "weight.shape[1] != features.shape[1]", "False", ids="groups")
@pytest.mark.parametrize(
    "head", [nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(6, 4, 3, padding=1)], ids=["groups", "padding"]
)
def test_convolution_that_is_no_linear_map_of_the_features_is_noticed(head):
    head = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), head, nn.Flatten())
    assert_not_closed_form(PooledNet(head=head), "groups or padding")
    assert_not_closed_form(PooledNet(tail=nn.ReLU(), head=head), "", exact=True)


def test_logits_changed_in_place_are_noticed():
    assert_not_closed_form(PooledNet(after=Apply(lambda f: f.div_(2))), "its output is changed in place")


def test_two_linear_layers_are_noticed():
    head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    assert_not_closed_form(PooledNet(head=head), "between this layer and the classifier, channels")
    head[1] = nn.LeakyReLU()
    assert_not_closed_form(PooledNet(tail=nn.ReLU(), head=head), "", exact=True)


def test_functional_classifier_is_noticed():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x @ self.weight.T

    assert_not_closed_form(PooledNet(head=Functional()), "'conv'.*channels")


def test_skip_around_the_classifier_is_noticed():
    class Bypass(PooledNet):
        def forward(self, x):
            g = self.tail(self.conv(x)).mean((2, 3))
            return self.head(g) + g[:, :4]

    assert_not_closed_form(Bypass(), "does not return the output of this layer")


def test_logits_that_are_clamped_later_are_noticed_then():
    net = PooledNet(after=Apply(lambda f: f.clamp(-0.6, 0.6))).double().eval()
    small, large = X.double() / 10, 4 * X.double()
    assert lf.measure_flatness(net, [(small, Y)]).layers["conv"].method == "closed_form"
    layer = lf.measure_flatness(net, [(small, Y), (large, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


def test_later_failure_of_the_closed_form_says_what_is_in_the_sum():
    net = PooledNet(after=Apply(lambda f: f.clamp(-0.6, 0.6))).double()
    layer = lf.measure_flatness(net, [(X.double() / 10, Y), (4 * X.double(), Y)]).layers["conv"]
    assert "for some samples; for other samples, the number may contain the whole Hessian" in layer.info.reason


@pytest.mark.parametrize(
    "after", [lambda f: f * (1 + 3e-5), lambda f: 10 * torch.tanh(f / 10)], ids=["temperature", "soft cap"]
)
def test_slight_changes_of_logits_are_noticed_in_float32(after):
    layer = lf.measure_flatness(PooledNet(after=Apply(after)), [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


class HalvesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def test_what_changes_gradients_after_the_head_is_noticed():
    layer = lf.measure_flatness(PooledNet(after=Apply(HalvesGradients.apply)), [(X, Y)]).layers["conv"]
    assert layer.method == "gauss_newton"
    with pytest.raises(lf.NotExactError, match="changes gradients but not values"):
        measure(PooledNet(after=Apply(HalvesGradients.apply)))
