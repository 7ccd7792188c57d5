"""Figures of several layers."""

import math

import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from torch import nn

import lightning_flatness as lf
from lightning_flatness.plots import plot_block_traces, plot_layer_history, plot_layers
from lightning_flatness.plots.layers import EXACT_COLOUR, INEXACT_COLOUR


def report(activation=nn.SiLU, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        activation(),
        nn.Conv2d(4, 6, 3),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    batch = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    return lf.measure_flatness(net, [batch], layers="all", **options)


@pytest.mark.parametrize("measure", ["hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness"])
def test_bars_are_the_measures_in_order(drawn, measure):
    measured = report(nn.ReLU)
    figure, ax = plot_layers(measured, measure)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [getattr(layer, measure) for layer in measured.layers.values()]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "6"]
    assert ax.yaxis_inverted(), "the first layer is on top"
    assert ax.get_xscale() == "log"
    assert ax.get_legend() is None
    assert drawn(figure)


def test_what_is_not_exact_is_grey_and_has_whiskers(drawn):
    figure, ax = plot_layers(report(residual="hutchinson"))
    colours = [bar.get_facecolor() for bar in ax.patches[:3]]
    expected = [INEXACT_COLOUR, EXACT_COLOUR, EXACT_COLOUR]
    assert all(same_color(a, b) for a, b in zip(colours, expected, strict=True))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["exact", "not exact"]
    assert len(ax.containers) > 1, "an error bar"
    assert drawn(figure)


def test_bars_with_other_axes():
    figure = Figure()
    ax = figure.subplots()
    assert plot_layers(report(), ax=ax) == (figure, ax)
    assert plot_layer_history([{"epoch": 0, "a/relative_flatness": 1.0}], ax=ax) == (figure, ax)


HISTORY = [
    {"epoch": 0, "relative_flatness": 3.0, "conv1/relative_flatness": 1.0, "conv2/relative_flatness": 2.0},
    {"epoch": 1, "relative_flatness": 5.0, "conv1/relative_flatness": 2.0},
]


def test_curves_are_those_of_the_layers(drawn):
    figure, ax = plot_layer_history(HISTORY)
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert list(lines) == ["conv1", "conv2"]
    assert lines["conv1"] == [1.0, 2.0]
    assert lines["conv2"][0] == 2.0
    assert math.isnan(lines["conv2"][1])
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel().startswith("relative flatness")
    assert drawn(figure)


def test_curves_that_are_not_positive_are_linear():
    _, ax = plot_layer_history([{"epoch": 0, "a/hessian_trace": -1.0}], "hessian_trace")
    assert ax.get_yscale() == "linear"


def test_many_layers_have_no_legend(drawn):
    record = {"epoch": 0} | {f"layer{n}/relative_flatness": n + 1.0 for n in range(100)}
    figure, ax = plot_layer_history([record])
    assert ax.get_legend() is None
    assert drawn(figure)


def test_diagonals_have_no_heat_map():
    diagonal = report(nn.ReLU, measures=["hessian_trace"])
    with pytest.raises(lf.FlatnessError, match=r"'0' has only the diagonal.*'relative_flatness'"):
        plot_block_traces(diagonal.layers["0"])
    _, ax = plot_layers(diagonal, "hessian_trace")
    assert len(ax.patches) == 3
