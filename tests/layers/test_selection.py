"""Which layers are measured, and what is said of names that fit none."""

from collections import OrderedDict

import pytest
from torch import nn

import lightning_flatness as lf
from tests.refused import Net, X, Y, refused


def test_no_convolution():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 4))
    refused(lf.LayerSelectionError, "layers='last': no convolution runs.*there are '1', '3'", net)
    refused(lf.LayerSelectionError, "no convolution .*and no nn.Linear", nn.Sequential(nn.Flatten(), nn.ReLU()))


def test_transposed_convolutions_do_not_count():
    net = nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    refused(lf.LayerSelectionError, "no convolution", net)


def test_no_linear_classifier():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten())
    report = lf.measure_flatness(net, [(X, Y)])
    assert (report.layers["0"].method, report.exact) == ("gauss_newton", True)


def test_only_convolution_is_the_classifier():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 4, 1), nn.Flatten())
    refused(lf.LayerSelectionError, "no convolution runs before the classifier '1'.*there are '1'", net)


def test_layer_that_never_runs():
    refused(lf.LayerSelectionError, "Layer 'idle' never runs.*Take it out of layers", layers=["conv", "idle"])


@pytest.mark.parametrize(("pattern", "meant"), [("covn", "conv"), ("stemm", "stem"), ("features.3", "idle")])
def test_pattern_without_a_match(pattern, meant):
    refused(
        lf.LayerSelectionError, f"layers='{pattern}' matches no convolution.*Did you mean .*'{meant}'", layers=pattern
    )


@pytest.mark.parametrize(("pattern", "meant"), [("c", "net.c"), ("model.net.h", "net.h"), ("x.net.a", "net.a")])
def test_layers_of_the_same_last_name_are_meant_first(pattern, meant):
    net = nn.Sequential()
    parts = {"a": nn.Conv2d(2, 3, 1), "c": nn.Conv2d(3, 4, 3), "flat": nn.Flatten(), "h": nn.Linear(64, 4)}
    net.add_module("net", nn.Sequential(OrderedDict(parts)))
    refused(lf.LayerSelectionError, f"Did you mean '{meant}'", net, layers=pattern)


def test_one_pattern_of_several_without_a_match():
    refused(lf.LayerSelectionError, "layers='nothing.*' matches no convolution", layers=["conv", "nothing.*"])


@pytest.mark.parametrize(("layer", "kind"), [("activation", "SiLU")])
def test_named_layer_is_no_convolution(layer, kind):
    refused(lf.LayerSelectionError, f"Layer '{layer}' is a {kind}, not a convolution", layers=layer)


def test_layer_that_runs_twice():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(3))

    layer = lf.measure_flatness(Twice(), [(X, Y)]).layers["conv"]
    assert (layer.method, layer.exact) == ("gauss_newton", False)


@pytest.mark.parametrize("layers", ["", [], [""], None, 3, [3], ["conv", None]], ids=repr)
def test_empty_or_senseless_layers(layers):
    refused(lf.FlatnessError, "give 'last', 'all', 'classifier', or names or glob patterns", layers=layers)
