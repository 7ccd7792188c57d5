"""Flatness of other losses than plain cross-entropy is that of the autograd Hessian too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.networks import Network, focal, randomise_statistics, recipes, two_convolutions


def net(activation=nn.ReLU, classes=4):
    return two_convolutions((2, 3, 4), (3, 2), classes, activation)


X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 3, 2, 1, 0])
WEIGHT = [0.5, 2.0, 1.0, 0.25]

LOSSES = {
    "label smoothing": ({"label_smoothing": 0.2}, nn.CrossEntropyLoss(label_smoothing=0.2), Y),
    "class weights": ({"class_weight": WEIGHT}, nn.CrossEntropyLoss(torch.tensor(WEIGHT).double()), Y),
    "both": (
        {"class_weight": WEIGHT, "label_smoothing": 0.2},
        nn.CrossEntropyLoss(torch.tensor(WEIGHT).double(), label_smoothing=0.2),
        Y,
    ),
    "ignored": ({"ignore_index": 1}, nn.CrossEntropyLoss(ignore_index=1), Y),
    "ignored by default": ({}, nn.CrossEntropyLoss(), torch.where(Y == 1, -100, Y)),
    "soft": ({}, nn.CrossEntropyLoss(), torch.rand(6, 4).double().softmax(1)),
    "soft, weights": (
        {"class_weight": WEIGHT},
        nn.CrossEntropyLoss(torch.tensor(WEIGHT).double()),
        torch.rand(6, 4).double().softmax(1),
    ),
    "binary": ({"loss": "binary_cross_entropy"}, nn.BCEWithLogitsLoss(), torch.rand(6, 4).round().double()),
    "mse": ({"loss": "mse"}, nn.MSELoss(), torch.randn(6, 4).double()),
    "module": ({"loss": nn.CrossEntropyLoss(label_smoothing=0.3)}, nn.CrossEntropyLoss(label_smoothing=0.3), Y),
    "focal": ({"loss": focal}, lambda f, y: focal(f, y).mean(), Y),
    "not convex": ({"loss": lambda f, y: (9 * f).cos().sum(1)}, lambda f, y: (9 * f).cos().sum(1).mean(), Y),
    "Huber": (
        {"loss": lambda f, y: F.huber_loss(f, y, reduction="none").mean(1)},
        F.huber_loss,
        torch.randn(6, 4).double(),
    ),
}


@pytest.mark.parametrize("layer", ["0", "2", "6"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_matches_the_autograd_hessian(name, layer):
    options, of_torch, targets = LOSSES[name]
    assert_matches_oracle(net(), (X, targets), layer, loss_function=of_torch, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_curved_activations_too(name):
    options, of_torch, targets = LOSSES[name]
    assert_matches_oracle(net(nn.SiLU), (X, targets), "2", loss_function=of_torch, **options)


def test_another_loss_is_noticed():
    with pytest.raises(AssertionError):
        assert_matches_oracle(net(nn.SiLU), (X, Y), "2", label_smoothing=0.2)
    with pytest.raises(AssertionError):
        assert_matches_oracle(net(), (X, Y), "2", loss_function=nn.CrossEntropyLoss(torch.tensor(WEIGHT).double()))


@pytest.mark.slow
@given(recipe=recipes(), name=st.sampled_from(["binary", "mse"]), seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_random_networks(recipe, name, seed):
    network = Network(recipe)
    inputs, targets = network.batch()
    torch.manual_seed(seed)
    targets = F.one_hot(targets, network(inputs.float()).shape[1]).double()
    options, of_torch, _ = LOSSES[name]
    assert_matches_oracle(network, (inputs, targets), "conv", loss_function=of_torch, **options)


@pytest.mark.parametrize("name", ["class weights", "ignored", "focal", "binary"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_uneven_batches_give_the_mean_of_the_whole(name, layer):
    options, _, targets = LOSSES[name]
    model = net().double()
    whole = lf.measure_flatness(model, [(X.double(), targets)], layers=layer, **options).layers[layer]
    parts = [(X[n].double(), targets[n]) for n in (slice(0, 1), slice(1, 2), slice(2, 6))]
    split = lf.measure_flatness(model, parts, layers=layer, **options).layers[layer]
    assert split.num_samples == whole.num_samples
    assert_close(split.block_traces, whole.block_traces, rtol=1e-12, atol=1e-15)
    assert_close(split.relative_flatness, whole.relative_flatness, rtol=1e-12, atol=0)


def test_one_logit_for_two_classes():
    # The logistic loss of one logit f is the cross-entropy of the logits (0, f).
    one = net(classes=1).double()
    y = (Y > 1).double()
    binary = lf.measure_flatness(one, [(X.double(), y)], layers=["0", "2"], loss="binary_cross_entropy")
    two = nn.Sequential(one, nn.ZeroPad1d((1, 0)))
    cross_entropy = lf.measure_flatness(two, [(X.double(), y.long())], layers=["0.0", "0.2"])
    for name, layer in binary.layers.items():
        assert_close(layer.block_traces, cross_entropy.layers[f"0.{name}"].block_traces, rtol=1e-11, atol=1e-15)
        assert layer.exact


def test_log_probabilities_are_no_logits_for_other_losses():
    # A number added to all logits changes these losses, so the head is not linear for them.
    model = nn.Sequential(net(), nn.LogSoftmax(1)).double()
    targets = torch.rand(6, 4).round().double()
    assert lf.measure_flatness(model, [(X.double(), Y)], layers="0.2").layers["0.2"].method == "closed_form"
    layer = lf.measure_flatness(model, [(X.double(), targets)], layers="0.2", loss="mse").layers["0.2"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


def test_all_targets_ignored():
    with pytest.raises(lf.BatchError, match="all targets ignored"):
        lf.measure_flatness(net(), [(X, torch.full((6,), -100))])
    some = lf.measure_flatness(net(), [(X, torch.full((6,), -100)), (X, Y)])
    assert_close(some.relative_flatness, lf.measure_flatness(net(), [(X, Y)]).relative_flatness, rtol=1e-6, atol=0)


def test_weighted_loss_needs_targets():
    with pytest.raises(lf.BatchError, match="class_weight.*this batch has none"):
        lf.measure_flatness(net(), [X], class_weight=WEIGHT)
    randomised = randomise_statistics(net())
    assert lf.measure_flatness(randomised, [X], loss="mse").exact


def test_a_loss_that_holds_single_precision():
    net, weight = linear_net().float(), torch.rand(4)

    def trace(weight):
        loss = nn.CrossEntropyLoss(weight, reduction="none")
        return lf.measure_flatness(
            net, [(VECTORS.float(), LABELS)], layers="a", loss=lambda f, y: loss(f, y)
        ).hessian_trace

    assert_close(trace(weight), trace(weight.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [lambda f: f, lambda f, y: F.mse_loss(f, y, reduction="none"), lambda f, y: f @ f])
def test_errors_in_a_loss_name_it(loss):
    net = linear_net()
    with pytest.raises(lf.BatchError, match="The loss '<lambda>' fails on logits of shape"):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": None},
        {"ignore_index": "x"},
        {"class_weight": "balanced"},
        {"class_weight": torch.ones(4, 4)},
        {"label_smoothing": "a"},
        {"tolerance": "a"},
        {"seed": 1.5},
        {"seed": None},
    ],
    ids=str,
)
def test_options_of_a_wrong_type(options):
    net = linear_net()
    with pytest.raises(lf.FlatnessError):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", **options)


def test_probabilities_that_are_none():
    net = linear_net()
    with pytest.raises(lf.BatchError, match="probabilities must be finite and not negative"):
        lf.measure_flatness(net, [(VECTORS, torch.full((8, 4), -1.0))], layers="a")


def test_values_to_be_predicted_need_another_loss():
    net, values = linear_net(), torch.linspace(-1, 1, 32).reshape(8, 4)
    with pytest.raises(lf.BatchError, match="For regression, give loss='mse'"):
        lf.measure_flatness(net, [(VECTORS, values)], layers="a")
    with pytest.warns(UserWarning, match="For regression, use loss='mse'"):
        lf.measure_flatness(net, [(VECTORS, values.abs())], layers="a")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.HuberLoss])
def test_a_class_of_losses_is_no_loss(loss):
    with pytest.raises(lf.FlatnessError, match=rf"is a class: give an instance, nn.{loss.__name__}\(\)"):
        lf.measure_flatness(linear_net(), [(VECTORS, LABELS)], layers="a", loss=loss)

    class Own(nn.Module):
        pass

    with pytest.raises(lf.FlatnessError, match=r"loss=Own is a class: give an instance, Own\(\)"):
        lf.measure_flatness(linear_net(), [(VECTORS, LABELS)], layers="a", loss=Own)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return 2 * logits * gradient[:, None]


NO_SECOND = {
    "of torch": (lambda f, y: nn.functional.multi_margin_loss(f, y, reduction="none"), "multi_margin_loss_backward"),
    "once_differentiable": (lambda f, y: Once.apply(f), "once_differentiable"),
}


@guards(
    "functional/loss_argument.py",
    "if differentiable_once([residual]):",
    "if False:",
    ids="measure_flatness-once_differentiable",
)
@guards("functional/loss_argument.py", "if not says_no_second_derivative(error):", "if True:")
@pytest.mark.parametrize("loss", NO_SECOND)
@pytest.mark.parametrize("measure", [lf.measure_flatness, lf.hessian_spectrum], ids=lambda f: f.__name__)
def test_a_loss_without_a_second_derivative(measure, loss):
    function, operation = NO_SECOND[loss]
    options = {"layers": "a"} if measure is lf.measure_flatness else {}
    with pytest.raises(lf.FlatnessError, match=rf"no second derivative in PyTorch \(.*{operation}.*gather, clamp"):
        measure(linear_net(), [(VECTORS, LABELS)], loss=function, **options)


def test_a_loss_of_ones_own_may_be_derived_from_one_of_torch():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, f, y):
            return focal(f, y)

    net = linear_net()
    by_module = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", loss=Focal())
    by_function = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", loss=focal)
    assert by_module.hessian_trace == by_function.hessian_trace
    assert by_module.hessian_trace != lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a").hessian_trace
