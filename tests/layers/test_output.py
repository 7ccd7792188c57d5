"""A layer whose output is the logits is exact for any number of classes, and takes no backward pass."""

from math import prod

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional import ClassCurvature
from lightning_flatness.layers import gauss_newton
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.guarding import guards

CLASSES = 150
MEASURES = ("hessian_trace", "relative_flatness", "normalized_relative_flatness", "channelwise_flatness")


class Net(nn.Module):
    """A curved network, whose classifier is the only layer that is exact; ``after`` follows the classifier."""

    def __init__(self, classifier, after=None):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(2, 6, 3), classifier
        self.after = after or nn.Identity()

    def forward(self, x):
        g = torch.tanh(self.conv(x)).mean((2, 3), keepdim=isinstance(self.classifier, nn.Conv2d)) ** 2
        return self.after(self.classifier(g).flatten(1))


def net(after=None, classifier=None, classes=CLASSES):
    torch.manual_seed(0)
    return Net(classifier or nn.Linear(6, classes), after).double().eval()


def batch(classes=CLASSES):
    torch.manual_seed(1)
    return torch.randn(6, 2, 5, 5).double(), torch.randint(classes, (6,))


def measure(model, layers="classifier", **options):
    return lf.measure_flatness(model, [batch()], layers=layers, measures=MEASURES, progress=False, **options)


@guards("layers/methods.py", "sampled = not is_output and is_sampled", "sampled = is_sampled")
@pytest.mark.parametrize("classifier", [nn.Linear(6, CLASSES), nn.Conv2d(6, CLASSES, 1)], ids=["linear", "1x1"])
@pytest.mark.parametrize("after", [None, nn.LogSoftmax(1)], ids=["logits", "log-softmax"])
def test_many_classes_are_exact(classifier, after):
    model = net(after, classifier)
    assert_matches_oracle(model, batch(), "classifier")
    layer = measure(model).layers["classifier"]
    assert layer.exact
    assert layer.info.reason == ""
    assert (layer.info.backward_passes, layer.info.multiplications) == (0, 6 * CLASSES)
    assert set(layer.standard_errors.values()) == {0.0}


def test_every_measure_is_that_of_all_columns(monkeypatch):
    actual = measure(net()).layers["classifier"]
    monkeypatch.setattr("lightning_flatness.layers.certify.is_output", lambda *_: False)
    expected = measure(net(), tolerance=0).layers["classifier"]
    assert expected.info.backward_passes == CLASSES - 1
    for name in MEASURES:
        assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-11, atol=0)


def test_no_backward_pass_is_made_for_columns(monkeypatch):
    monkeypatch.setattr(gauss_newton, "pull_back", None)
    assert measure(net()).exact


@guards("layers/certificates/path.py", "geometry.groups == 1 and not any(geometry.padding)", "True")
@pytest.mark.parametrize(
    ("shape", "classifier"),
    [((8, 1, 1), nn.Conv2d(8, 4, 2, 2, 1, groups=4)), ((2, 3, 3), nn.Conv2d(2, 4, 3, 3, 1))],
    ids=["groups", "padding"],
)
def test_convolutions_of_the_size_of_a_linear_map_are_not_taken_for_one(shape, classifier):
    torch.manual_seed(0)
    features = prod(shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, features), nn.Unflatten(1, shape), classifier, nn.Flatten())
    assert_matches_oracle(net.double(), batch(classes=4), "3")


def test_beside_layers_that_are_sampled():
    report = measure(net(), layers="all")
    assert [layer.exact for layer in report.layers.values()] == [False, True]
    expected = oracle_block_traces(net(), batch(), "classifier")
    assert_close(report.layers["classifier"].block_traces[0], expected, rtol=1e-9, atol=1e-15)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


class Reverse(nn.Module):
    def forward(self, logits):
        return Reversed.apply(logits)


class Rolled(nn.Module):
    def forward(self, logits):
        return logits.roll(1, dims=1)


@guards("layers.certificates.path:is_output", returns=True)
@guards(
    "layers/certificates/path.py",
    "(pulled.flatten(1) - u).abs()",
    "(pulled.flatten(1).abs() - u.abs()).abs()",
    ids="reversed",
)
@pytest.mark.parametrize(
    "after", [Times(2.0), Times(1.001), Reverse(), Rolled()], ids=["double", "near", "reversed", "rolled"]
)
def test_logits_that_are_not_its_output_are_sampled(after):
    layer = measure(net(after)).layers["classifier"]
    assert not layer.exact
    assert layer.info.reason == "classes with little probability mass are sampled"


@pytest.mark.parametrize("after", [None, Times(2.0)], ids=["output", "not output"])
def test_few_classes_are_exact_in_any_case(after):
    classes = 9
    model = net(after, classes=classes)
    assert_matches_oracle(model, batch(classes), "classifier")


def observed(model, layers, inputs, targets):
    observer = lf.FlatnessObserver(model, layers=layers)
    with torch.inference_mode():
        reason = observer.why_not_live(inputs, targets)
        if reason:
            return reason
        with observer.listen() as listener:
            model(inputs)
    return observer.observed(listener, targets)


@guards("layers/certify.py", "elif not layer.is_output:", "else:", ids="classifier")
@guards("layers/recording.py", "if self._live and module is self._classifier:", "if False:", ids="classifier")
@pytest.mark.parametrize("layers", ["classifier", ["classifier", "conv"]], ids=["classifier", "with convolution"])
def test_its_passes_can_be_observed(layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    model = model.double().eval()
    names = ["4"] if layers == "classifier" else ["0", "4"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = observed(model, names, *batch())
    assert set(found) == set(names)
    expected = lf.FlatnessObserver(model, layers=names)(*batch())
    for name in names:
        assert_close(found[name].block_traces, expected[name].block_traces, rtol=1e-12, atol=1e-18)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_observed_logits_that_are_changed_are_refused():
    """On the batches of the trial the network returns its classifier's output, then it masks a class."""
    model = net()
    observer = lf.FlatnessObserver(model, layers="classifier")
    inputs, targets = batch()
    with torch.inference_mode():
        assert observer.why_not_live(inputs, targets) == ""
        model.after = Times(1.001)
        with observer.listen() as listener:
            model(inputs)
    with pytest.raises(lf.FlatnessError, match="does not return the output of this layer"):
        observer.observed(listener, targets)


@guards("layers/trial.py", " or (layer.is_output and name != context.selection.classifier_name)", "")
def test_an_output_that_is_not_the_classifier_is_not_observed():
    """The last layer that runs is another one, beside the layer whose output is copied and returned."""

    class Beside(Net):
        def __init__(self):
            super().__init__(nn.Linear(6, CLASSES))
            self.other = nn.Linear(6, 3)

        def forward(self, x):
            g = self.conv(x).relu().mean((2, 3))
            logits = self.classifier(g)
            self.other(g)
            return logits.clone()

    torch.manual_seed(0)
    model = Beside().double().eval()
    assert "is not measured by the closed form, and is not the classifier" in observed(model, "classifier*", *batch())
    assert measure(model, layers="classifier*").exact


@guards("layers/certificates/path.py", "4 * logits.shape[1] ** 0.5 + 16", "1e4")
@pytest.mark.parametrize("factor", [1.001, 0.9995])
def test_a_temperature_near_one_counts_in_float32(factor):
    torch.manual_seed(0)
    model, plain = net(Times(factor), classes=9).float(), net(classes=9)
    inputs, targets = batch(9)
    found = lf.measure_flatness(model, [(inputs.float(), targets)], layers="classifier").hessian_trace
    expected = oracle_block_traces(net(Times(factor), classes=9), (inputs, targets), "classifier").trace()
    other = oracle_block_traces(plain, (inputs, targets), "classifier").trace()
    assert abs(found / float(expected) - 1) < 1e-5 < abs(float(other / expected) - 1)


class Scores(nn.Module):
    """One score for each of several candidates, by the same linear map, as in multiple choice."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(5, 1)

    def forward(self, x):
        return self.score(x).squeeze(-1)


class Sum(nn.Module):
    """A convolution on one pixel and a linear layer, whose outputs are added to be the logits."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution, self.linear = convolution, nn.Linear(8, 4)

    def forward(self, x):
        return self.convolution(x[..., None, None]).flatten(1) + self.linear(x)


@guards("layers/certificates/path.py", " or not is_linear", "")
@pytest.mark.parametrize(
    ("model", "shape", "layer"),
    [
        (Scores(), (6, 4, 5), "score"),
        (Sum(nn.Conv2d(8, 4, 1, groups=2)), (6, 8), "convolution"),
        (Sum(nn.Conv2d(8, 4, 3, padding=1)), (6, 8), "convolution"),
        (Sum(nn.Conv2d(8, 4, 1)), (6, 8), "convolution"),
    ],
    ids=["scores", "groups", "padding", "1x1"],
)
def test_layers_of_the_shape_of_the_logits(model, shape, layer):
    torch.manual_seed(0)
    some = torch.randn(*shape), torch.arange(6) % 4
    assert_matches_oracle(model, some, layer)
    assert_matches_oracle(model, some, layer, measures=MEASURES, filters=[0])


@guards("functional/classifier.py", "norms @ curvature.diagonals() if diagonal else ", "")
def test_diagonals_need_no_square_of_the_classes(monkeypatch):
    expected = measure(net()).hessian_trace
    monkeypatch.setattr(ClassCurvature, "summed", None)
    inputs, targets = batch()
    found = lf.measure_flatness(net(), [(inputs, targets)], layers="classifier", measures=("hessian_trace",))
    assert found.hessian_trace == pytest.approx(expected, rel=1e-12)


@guards("layers/certificates/layer.py", "if call.has_changed_input:", "if False:")
def test_features_that_are_changed_after_a_computed_kernel_are_refused():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.classifier = nn.Linear(6, 7), parametrizations.weight_norm(nn.Linear(7, 4))

        def forward(self, x):
            features = self.linear(x).relu()
            logits = self.classifier(features)
            features.mul_(2)
            return logits

    with pytest.raises(lf.LayerSelectionError, match=r"'classifier': the forward changes the layer's input in place"):
        lf.measure_flatness(Doubled(), [(torch.randn(5, 6), torch.arange(5) % 4)], layers="classifier")


@guards("layers/certificates/head.py", "scale + scale.gather(1, top)", "scale.amax(1, keepdim=True)")
def test_a_huge_logit_does_not_hide_a_change_of_the_others():
    """A class is switched off by its bias. The others are within bounds on the first samples, later they are not."""

    class Bounded(nn.Module):
        def forward(self, logits):
            return torch.cat([logits[:, :3].clamp(-1, 1), logits[:, 3:]], dim=1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Bounded()).eval()
    with torch.no_grad():
        model[0].bias[3] = -1e7
    inputs, targets = torch.randn(8, 6), torch.arange(8) % 3
    observer = lf.FlatnessObserver(model, layers="0")
    with torch.inference_mode():
        assert observer.why_not_live(0.1 * inputs, targets) == ""
        with observer.listen() as listener:
            model(5 * inputs)
    with pytest.raises(lf.FlatnessError, match="does not return the output of this layer"):
        observer.observed(listener, targets)
