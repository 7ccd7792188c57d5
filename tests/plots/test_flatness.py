"""Figures of flatness: curves over the epochs, layers side by side, heat maps of block traces."""

import math

import pytest
import torch
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from torch import nn

import lightning_flatness as lf
from lightning_flatness.plots import plot_block_traces, plot_history, plot_layer_history, plot_layers
from lightning_flatness.plots.flatness import EXACT_COLOUR, INEXACT_COLOUR
from tests.networks import two_convolutions


def history(flatness=(3.0, 80.0, 40.0), accuracy=(0.3, 0.8, 0.9)):
    return [
        {"epoch": epoch, "step": 4 * epoch, "relative_flatness": value, "accuracy": other, "hessian_trace": 1.0}
        for epoch, (value, other) in enumerate(zip(flatness, accuracy, strict=True))
    ]


def curves(figure):
    """Values of the curve on the left axis, and of that on the right."""
    left, right = figure.axes
    return [[list(line.get_ydata()) for line in axes.lines] for axes in (left, right)]


def test_history_has_two_axes(drawn):
    figure, ax = plot_history(history(), accuracy_label="validation accuracy", data="train")
    assert figure.axes[0] is ax
    assert curves(figure) == [[[0.3, 0.8, 0.9]], [[3.0, 80.0, 40.0]]]
    assert ax.get_ylabel() == "validation accuracy"
    assert figure.axes[1].get_ylabel() == "relative flatness on training data"
    assert (ax.get_yscale(), figure.axes[1].get_yscale()) == ("linear", "log")
    assert drawn(figure)


def test_history_is_that_of_the_callback():
    record = {
        "epoch": 7,
        "step": 1,
        "accuracy": 0.5,
        "hessian_trace": 1.0,
        "relative_flatness": 2.0,
        "weight_norm": 3.0,
    }
    figure, ax = plot_history([record])
    assert list(ax.lines[0].get_xdata()) == list(figure.axes[1].lines[0].get_xdata()) == [7]


def test_some_accuracies_are_missing(drawn):
    figure, _ = plot_history(history(accuracy=(None, 0.8, None)))
    ((accuracy,), (flatness,)) = curves(figure)
    assert [math.isnan(value) for value in accuracy] == [True, False, True]
    assert flatness == [3.0, 80.0, 40.0]
    assert drawn(figure)


def test_all_accuracies_are_missing(drawn):
    figure, _ = plot_history(history(accuracy=(None, None, None)))
    assert curves(figure) == [[], [[3.0, 80.0, 40.0]]]
    assert drawn(figure)
    without = [{"epoch": 0, "relative_flatness": 3.0}]
    assert curves(plot_history(without)[0]) == [[], [[3.0]]]


@pytest.mark.parametrize("flatness", [(3.0, 0.0, 1.0), (3.0, -2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -3.0)])
def test_flatness_that_is_not_positive_has_a_linear_axis(flatness, drawn):
    figure, _ = plot_history(history(flatness))
    assert figure.axes[1].get_yscale() == "linear"
    assert curves(figure)[1] == [list(flatness)]
    assert drawn(figure)


@pytest.mark.parametrize("epochs", [0, 1, 60])
@pytest.mark.parametrize("burn_in", [None, 0, 5])
@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_length_of_the_history(epochs, burn_in, drawn):
    values = [1.0 + epoch for epoch in range(epochs)]
    figure, ax = plot_history(history(values, values), burn_in=burn_in)
    assert [text.get_text() for text in ax.texts] == (["burn-in"] if burn_in else [])
    assert drawn(figure)
    if epochs == 1:
        low, high = ax.get_xlim()
        assert all(tick == int(tick) for tick in ax.get_xticks() if low <= tick <= high)


def report(activation=nn.SiLU, **options):
    net = two_convolutions((1, 4, 6), (3, 3), 3, activation)
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


def image(figure):
    return torch.as_tensor(figure.axes[0].images[0].get_array().data)


def test_block_traces_as_they_are(drawn, layer):
    measured = layer()
    figure, ax = plot_block_traces(measured, sort=False)
    assert figure.axes[0] is ax
    torch.testing.assert_close(image(figure), measured.block_traces[0])
    assert ax.get_title().startswith("2: Hessian trace")
    assert ax.get_xlabel() == "filter s'"
    assert drawn(figure)


def test_sorting_is_a_permutation_of_filters(layer):
    measured = layer()
    plain, ordered = measured.block_traces[0], image(plot_block_traces(measured)[0])
    order = [int((plain.diagonal() - value).abs().argmin()) for value in ordered.diagonal()]
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(ordered, plain[order][:, order])


def test_filters_that_interact_are_put_side_by_side(layer):
    measured = layer()
    pattern = torch.tensor([0, 1, 0, 1, 0, 1])
    traces = torch.where(pattern[:, None] == pattern, 1.0, -0.1).double() + torch.eye(6)
    object.__setattr__(measured, "block_traces", traces[None])
    ordered = image(plot_block_traces(measured)[0])
    assert int((ordered.diff(dim=1)[0].abs() > 0.5).sum()) <= 2
    neighbours = ordered.diagonal(1)
    assert int((neighbours < 0).sum()) == 1


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(("filters", "groups"), [(1, 1), (2, 1), (4, 4), (8, 2), (8, 4)])
def test_few_filters_and_groups(filters, groups, sort, drawn, layer):
    measured = layer(filters, groups)
    figure, _ = plot_block_traces(measured, sort=sort)
    shown = image(figure)
    assert shown.shape == (filters, filters)
    size = filters // groups
    outside = torch.block_diag(*[torch.ones(size, size)] * groups) == 0
    assert not shown[outside].any()
    torch.testing.assert_close(shown.trace().item(), measured.hessian_trace)
    torch.testing.assert_close(shown.sum(), measured.block_traces.sum())
    assert drawn(figure)


@pytest.mark.parametrize("sort", [True, False])
def test_block_traces_of_zero(sort, drawn, layer):
    measured = layer()
    measured.block_traces.zero_()
    figure, _ = plot_block_traces(measured, sort=sort)
    assert drawn(figure)


def test_colours_are_centred_and_not_paled_by_one_filter(layer):
    measured = layer(filters=20)
    measured.block_traces[0, 0, 0] = 1e6
    heat_map = plot_block_traces(measured)[0].axes[0].images[0]
    low, high = heat_map.get_clim()
    assert low == -high
    assert 0 < high < 1e5
    assert heat_map.cmap(heat_map.norm(0.0))[:3] == pytest.approx(to_rgba("#f7f6f6")[:3], abs=0.02)
