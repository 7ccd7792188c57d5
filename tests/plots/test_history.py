"""Curves of accuracy and flatness over the epochs."""

import math

import pytest

from lightning_flatness.plots import plot_history


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
