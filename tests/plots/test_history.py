"""Figures over the epochs: accuracy and flatness in two panels, and every layer."""

import math

import pytest
from matplotlib.figure import Figure

import lightning_flatness as lf
from lightning_flatness.plots import plot_history, plot_layer_history


def history(flatness=(3.0, 80.0, 40.0), accuracy=(0.3, 0.8, 0.9), **also):
    return [
        {"epoch": epoch, "step": 4 * epoch, "relative_flatness": value, "accuracy": other, "hessian_trace": 1.0, **also}
        for epoch, (value, other) in enumerate(zip(flatness, accuracy, strict=True))
    ]


def curves(figure):
    """Values of the curves in every panel, without the marks of single epochs."""
    return [
        [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() not in (":", "-.", "None")]
        for ax in figure.axes
    ]


def test_accuracy_and_flatness_have_a_panel_each_and_share_the_epochs(drawn, heading):
    figure, ax = plot_history(history(), accuracy_label="validation accuracy", data="train")
    above, below = figure.axes
    assert above is ax
    assert curves(figure) == [[[0.3, 0.8, 0.9]], [[3.0, 80.0, 40.0]]]
    assert above.get_ylabel() == "validation accuracy"
    assert below.get_ylabel() == "relative flatness\n(loss)"
    assert heading(ax) == "Relative flatness training data"
    assert (above.get_yscale(), below.get_yscale()) == ("linear", "log")
    assert drawn(figure)
    assert above.get_xlim() == below.get_xlim()
    assert above.get_position().y0 > below.get_position().y1, "no curve can cross one of the other panel"


def test_the_best_epoch_and_the_stop_are_marked_in_both_panels(legend):
    figure, ax = plot_history(history(accuracy=(0.3, 0.9, 0.9)), burn_in=1, stopped=2)
    assert legend(ax) == ["burn-in: 1 epoch", "stopped after epoch 2", "highest accuracy 0.9, epoch 1"]
    for panel, height in zip(figure.axes, (0.9, 80.0), strict=True):
        lines = {line.get_linestyle(): line for line in panel.lines}
        assert list(lines[":"].get_xdata()) == [1, 1]
        assert list(lines["-."].get_xdata()) == [2, 2]
        assert lines["None"].get_xydata().tolist() == [[1, height]]
    _, ax = plot_history(history(), best=0)
    assert legend(ax) == ["best epoch 0"]


def test_the_best_of_two_validations_in_an_epoch_is_marked(legend):
    records = [record | {"epoch": record["epoch"] // 2} for record in history((3.0, 80.0), (0.3, 0.9))]
    for best, words in ((None, "highest accuracy 0.9, epoch 0"), (0, "best epoch 0")):
        figure, ax = plot_history(records, best=best)
        assert legend(ax) == [words]
        assert [mark(panel) for panel in figure.axes] == [[0, 0.9], [0, 80.0]]


def mark(panel):
    """The point that is marked in a panel."""
    return next(line.get_xydata()[0].tolist() for line in panel.lines if line.get_linestyle() == "None")


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_the_best_epoch_may_have_no_flatness(value, drawn, legend):
    figure, ax = plot_history(history((3.0, 2.0, value)))
    assert legend(ax) == ["highest accuracy 0.9, epoch 2"]
    assert "None" not in [line.get_linestyle() for line in figure.axes[1].lines]
    assert drawn(figure)
    assert legend(plot_history(history(accuracy=(0.5, value, 0.4)), best=1)[1]) == ["best epoch 1"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_the_axes_as_they_are(value, drawn):
    figure, _ = plot_history(history((value, 2.0, 1.0), relative_flatness_error=value))
    assert figure.axes[1].get_ylim() == plot_history(history((2.0, 2.0, 1.0)))[0].axes[1].get_ylim()
    assert drawn(figure)
    figure, ax = plot_layer_history([record | {"conv1/relative_flatness": value} for record in HISTORY])
    assert ax.get_yscale() == "log"
    assert drawn(figure)
    assert drawn(plot_layer_history([{"epoch": 0, "a/hessian_trace": value}], "hessian_trace")[0])


def test_labels_of_a_narrow_logarithmic_axis_are_plain_numbers():
    figure, _ = plot_history(history((2.0, 5.0, 3.0)))
    axis = figure.axes[1].yaxis
    figure.canvas.draw()
    low, high = axis.get_view_interval()
    shown = [
        label.get_text()
        for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if low <= at <= high
    ]
    assert shown == ["2", "3", "5"]
    assert not any(label.get_text() for label in axis.get_minorticklabels())


def test_a_band_shows_two_standard_errors(legend, drawn):
    figure, _ = plot_history(history(relative_flatness_error=1.0))
    below = figure.axes[1]
    (band,) = below.collections
    edges = {tuple(row) for row in band.get_paths()[0].vertices.tolist()}
    assert {(0.0, 1.0), (0.0, 5.0), (1.0, 78.0), (1.0, 82.0)} <= edges
    assert legend(below) == ["exact", "± 2 standard errors over samples"]
    assert below.get_ylim()[0] < 1.0
    assert drawn(figure)
    wide, _ = plot_history(history(relative_flatness_error=50.0))
    assert 0 < wide.axes[1].get_ylim()[0] < 3.0, "what is below zero leaves the logarithmic axis"
    assert drawn(wide)
    for unknown in ({}, {"relative_flatness_error": math.nan}, {"relative_flatness_error": None}):
        assert not plot_history(history(**unknown))[0].axes[1].collections


def test_values_that_are_not_exact_are_dashed_and_hollow(legend):
    records = history((1.0, 2.0, 3.0, 4.0), (0.1, 0.2, 0.3, 0.4))
    for record, exact in zip(records, (True, True, False, True), strict=True):
        record["exact"] = exact
    figure, ax = plot_history(records)
    solid, dashed = figure.axes[1].lines[:2]
    assert [math.isnan(value) for value in solid.get_ydata()] == [False, False, True, False]
    assert dashed.get_linestyle() == "--"
    assert [math.isnan(value) for value in dashed.get_ydata()] == [True, False, False, False]
    assert dashed.get_markevery() == [2]
    assert dashed.get_markerfacecolor() == "white"
    assert legend(figure.axes[1]) == ["exact (hollow, dashed: not exact)"]
    assert ax.get_title(loc="left").endswith("not exact where dashed")
    for record in records:
        record["exact"] = False
    figure, ax = plot_history(records)
    assert figure.axes[1].lines[0].get_linestyle() == "--"
    assert ax.get_title(loc="left").endswith("not exact")


def test_the_report_names_layer_samples_and_method(made_report, heading):
    _, ax = plot_history(history(), report=made_report([40.0], data="train"))
    assert heading(ax) == "Relative flatness of layer conv0 1,300 samples of training data; exact (Gauss-Newton)"
    _, ax = plot_history(history(), report=made_report([1.0, 2.0], inexact=[1]), data="val", measure="hessian_trace")
    assert heading(ax) == (
        "Hessian trace of 2 layers, summed 1,300 samples of validation data; 1 of 2 layers not exact (Gauss-Newton)"
    )


def test_the_records_name_them_too(heading):
    known = {"num_samples": 7, "data": "val", "layers": ["conv0"]}
    _, ax = plot_history(history(exact=True, method="closed_form", **known))
    assert heading(ax) == "Relative flatness of layer conv0 7 samples of validation data; exact (closed form)"
    _, ax = plot_history(history(exact=0.0, method="closed_form, gauss_newton", **{**known, "layers": ["a", "b"]}))
    assert heading(ax) == (
        "Relative flatness of 2 layers, summed 7 samples of validation data; not exact (closed form, Gauss-Newton)"
    )


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
    figure, _ = plot_history(history(accuracy=(None, None, None)), stopped=1)
    assert curves(figure) == [[[3.0, 80.0, 40.0]]]
    assert drawn(figure)
    without = [{"epoch": 0, "relative_flatness": 3.0}]
    assert curves(plot_history(without)[0]) == [[[3.0]]]


@pytest.mark.parametrize("flatness", [(3.0, 0.0, 1.0), (3.0, -2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -3.0)])
def test_flatness_that_is_not_positive_has_a_linear_axis(flatness, drawn):
    figure, _ = plot_history(history(flatness))
    assert figure.axes[1].get_yscale() == "linear"
    assert curves(figure)[1] == [list(flatness)]
    assert drawn(figure)


@pytest.mark.parametrize("epochs", [0, 1, 60])
@pytest.mark.parametrize("burn_in", [None, 0, 5])
@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_length_of_the_history(epochs, burn_in, drawn, legend):
    values = [1.0 + epoch for epoch in range(epochs)]
    figure, ax = plot_history(history(values, values), burn_in=burn_in)
    assert ("burn-in: 5 epochs" in legend(ax)) == bool(burn_in)
    assert drawn(figure)
    if epochs == 1:
        low, high = ax.get_xlim()
        assert all(tick == int(tick) for tick in ax.get_xticks() if low <= tick <= high)


@pytest.mark.parametrize("place", ["subplot", "free"])
def test_the_place_of_given_axes_is_divided(place, drawn):
    figure = Figure()
    ax = figure.subplots(1, 2)[1] if place == "subplot" else figure.add_axes((0.6, 0.1, 0.3, 0.8))
    others = set(figure.axes) - {ax}
    before = ax.get_position()
    assert plot_history(history(), ax=ax) == (figure, ax)
    (below,) = set(figure.axes) - others - {ax}
    assert drawn(figure)
    assert before.y0 <= below.get_position().y0 + 1e-9 < below.get_position().y1 < ax.get_position().y0
    assert not any(other.has_data() for other in others)


def test_other_measures_can_be_drawn():
    figure, _ = plot_history(history(normalized_relative_flatness=2.0), measure="normalized_relative_flatness")
    assert figure.axes[1].get_ylabel() == "normalised relative flatness\n(loss)"
    with pytest.raises(lf.FlatnessError, match="measure='loss'"):
        plot_history(history(), measure="loss")


HISTORY = [
    {"epoch": 0, "relative_flatness": 3.0, "conv1/relative_flatness": 1.0, "conv2/relative_flatness": 2.0},
    {"epoch": 1, "relative_flatness": 5.0, "conv1/relative_flatness": 2.0},
]


def test_curves_are_those_of_the_layers(drawn, legend):
    figure, ax = plot_layer_history(HISTORY)
    lines = dict(zip(legend(ax), (list(line.get_ydata()) for line in ax.get_lines()), strict=True))
    assert list(lines) == ["conv1", "conv2"]
    assert lines["conv1"] == [1.0, 2.0]
    assert lines["conv2"][0] == 2.0
    assert math.isnan(lines["conv2"][1])
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "relative flatness  (loss)"
    assert drawn(figure)


def test_layers_that_are_not_exact_are_dashed_and_bands_are_stated(heading):
    records = [record | {"conv2/exact": False, "conv1/relative_flatness_error": 0.05} for record in HISTORY]
    _, ax = plot_layer_history(records)
    assert [line.get_linestyle() for line in ax.get_lines()] == ["-", "--"]
    assert len(ax.collections) == 1
    assert heading(ax).endswith("2 standard errors over samples: at most 10 % (bands)")


def test_long_curves_have_no_markers():
    records = [{"epoch": epoch, "a/hessian_trace": 1.0, "b/hessian_trace": 2.0} for epoch in range(200)]
    _, ax = plot_layer_history(records, "hessian_trace")
    assert [line.get_marker() for line in ax.get_lines()] == ["None", "None"]


def test_a_history_of_one_layer_has_no_curves_of_layers():
    for records in ([], history()):
        with pytest.raises(lf.FlatnessError, match=r"no relative_flatness of single layers.*plot_history"):
            plot_layer_history(records)


def test_curves_that_are_not_positive_are_linear():
    _, ax = plot_layer_history([{"epoch": 0, "a/hessian_trace": -1.0}], "hessian_trace")
    assert ax.get_yscale() == "linear"


def test_many_layers_have_a_colour_bar_in_place_of_a_legend(drawn):
    record = {"epoch": 0} | {f"layer{n}/relative_flatness": n + 1.0 for n in range(100)}
    figure, ax = plot_layer_history([record])
    assert ax.get_legend() is None
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert (names[0], names[-1]) == ("layer0", "layer99")
    assert drawn(figure)
