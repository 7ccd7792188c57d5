"""The figure of all layers side by side."""

import dataclasses
import itertools
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lightning_flatness as lf
from lightning_flatness.plots import plot_layers
from tests.networks import two_convolutions


def points(ax):
    """Position and value of every dot, and whether it is filled."""
    return sorted(
        (y, x, line.get_markerfacecolor() != "white")
        for line in ax.lines
        if line.get_marker() in ("o", "D")
        for x, y in line.get_xydata().tolist()
    )


@pytest.mark.parametrize("measure", ["hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness"])
def test_dots_are_the_measures_in_order(drawn, measure):
    net = two_convolutions((1, 4, 6), (3, 3), 3, nn.ReLU)
    measured = lf.measure_flatness(net, [(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)], layers="all")
    figure, ax = plot_layers(measured, measure)
    values = [getattr(layer, measure) for layer in measured.layers.values()]
    assert points(ax) == [(index, value, True) for index, value in enumerate(values)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "6"]
    assert ax.yaxis_inverted(), "the first layer is on top"
    assert ax.get_ylabel() == "input  →  output"
    assert ax.get_xscale() == "log"
    assert ax.get_legend() is None
    assert drawn(figure)


def test_the_label_of_the_axis_is_left_of_the_names(made_report):
    figure, ax = plot_layers(made_report())
    figure.draw_without_rendering()
    assert ax.yaxis.label.get_window_extent().x1 < min(name.get_window_extent().x0 for name in ax.get_yticklabels())


def test_what_is_not_exact_is_hollow_and_named(made_report, drawn, legend, heading):
    figure, ax = plot_layers(made_report(inexact=[1], data="val"))
    assert [filled for _, _, filled in points(ax)] == [True, False, True]
    assert legend(ax) == ["exact", "not exact"]
    assert heading(ax) == (
        "Relative flatness of 3 layers 1,300 samples of validation data; 1 of 3 layers not exact (Gauss-Newton)"
    )
    assert drawn(figure)


@pytest.mark.parametrize(
    ("errors", "width", "words"),
    [
        ({"sampling": 0.3}, 0.6, "over samples"),
        ({"estimate": 0.4}, 0.8, "of estimates"),
        ({"sampling": 0.3, "estimate": 0.4}, 1.0, "over samples and of estimates"),
    ],
    ids=["samples", "estimates", "both"],
)
def test_bars_are_two_standard_errors(made_report, heading, errors, width, words):
    _, ax = plot_layers(made_report(**errors))
    (bars,) = ax.containers
    segments = bars.lines[2][0].get_segments()
    assert segments[2].tolist() == [[pytest.approx(8.0 - width), 2], [pytest.approx(8.0 + width), 2]]
    assert heading(ax).endswith(f"bars: ± 2 standard errors {words}")


@pytest.mark.filterwarnings("error")
def test_bars_below_zero_end_at_the_edge_of_a_logarithmic_axis(made_report, drawn):
    figure, ax = plot_layers(made_report(sampling=2.0))
    assert ax.get_xscale() == "log"
    assert all(end > 0 for segment in ax.containers[0].lines[2][0].get_segments() for end in segment[:, 0])
    assert drawn(figure)


@pytest.mark.parametrize("sampling", [None, math.nan, 0.0])
def test_without_errors_there_are_no_bars(made_report, heading, sampling):
    _, ax = plot_layers(made_report(sampling=sampling))
    assert not ax.containers
    assert "bars" not in heading(ax)


@pytest.mark.parametrize("number", [1, 4, 60, 300])
@pytest.mark.parametrize("own", [True, False])
def test_names_do_not_overlap(made_report, number, own, drawn):
    ax = None if own else Figure(figsize=(4, 3), dpi=100).subplots()
    figure, ax = plot_layers(made_report([1.0] * number), ax=ax)
    assert drawn(figure)
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert boxes
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_negative_values_have_a_linear_axis(made_report):
    assert plot_layers(made_report((1.0, -1.0)))[1].get_xscale() == "linear"


def test_a_value_that_is_not_defined_is_said_to_be(made_report, drawn):
    figure, ax = plot_layers(made_report((1.0, math.nan, 2.0)))
    assert [text.get_text() for text in ax.texts] == ["not defined"]
    assert drawn(figure)


@pytest.mark.parametrize("values", [(1.0, math.inf, 2.0), (math.inf, math.inf)])
def test_an_infinite_value_is_said_to_be(made_report, drawn, values):
    figure, ax = plot_layers(made_report(values, sampling=0.1))
    assert {text.get_text() for text in ax.texts} == {"infinite"}
    assert drawn(figure)


def test_what_was_not_measured_is_an_error(made_report):
    with pytest.raises(lf.FlatnessError, match="no values of neuronwise_flatness"):
        plot_layers(made_report(), "neuronwise_flatness")
    with pytest.raises(lf.FlatnessError, match="measure='loss'"):
        plot_layers(made_report(), "loss")


def test_the_loss_is_named_with_the_samples(made_report, heading):
    report = dataclasses.replace(made_report([1.0]), loss=0.1234, loss_name="cross_entropy", data="val")
    assert "cross_entropy 0.123 on 1,300 samples of validation data" in heading(plot_layers(report)[1])


def test_one_layer_is_named(made_report, heading):
    assert heading(plot_layers(made_report([1.0]))[1]).startswith("Relative flatness of layer conv0 ")


def test_axes_of_ones_own(made_report):
    figure = Figure()
    ax = figure.subplots()
    assert plot_layers(made_report(), ax=ax) == (figure, ax)
