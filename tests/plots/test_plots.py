"""Figures of results, and what they need."""

import math
import subprocess
import sys

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn

import lightning_flatness as lf
from lightning_flatness.plots import plot_block_traces, plot_history


def history(flatness=(3.0, 80.0, 40.0), accuracy=(0.3, 0.8, 0.9)):
    return [
        {"epoch": epoch, "step": 4 * epoch, "relative_flatness": value, "accuracy": other, "hessian_trace": 1.0}
        for epoch, (value, other) in enumerate(zip(flatness, accuracy, strict=True))
    ]


def layer(filters=6, groups=1):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, filters, 3, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(filters, 3),
    )
    return lf.measure_flatness(net, [(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)]).layers["2"]


def drawn(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png", dpi=50)
    return (tmp_path / "figure.png").stat().st_size > 1000


def curves(figure):
    """Values of the curve on the left axis, and of that on the right."""
    left, right = figure.axes
    return [[list(line.get_ydata()) for line in axes.lines] for axes in (left, right)]


# ------------------------------------------------------------------------------------------------------------- history


def test_history_has_two_axes(tmp_path):
    figure, ax = plot_history(history(), accuracy_label="validation accuracy", data="train")
    assert isinstance(figure, Figure)
    assert figure.axes[0] is ax
    assert curves(figure) == [[[0.3, 0.8, 0.9]], [[3.0, 80.0, 40.0]]]
    assert ax.get_ylabel() == "validation accuracy"
    assert figure.axes[1].get_ylabel() == "relative flatness on training data"
    assert (ax.get_yscale(), figure.axes[1].get_yscale()) == ("linear", "log")
    assert drawn(figure, tmp_path)


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


@pytest.mark.parametrize(
    "plot",
    [lambda ax: plot_history(history(), ax=ax), lambda ax: plot_block_traces(layer(), ax=ax)],
    ids=["history", "traces"],
)
def test_axes_of_ones_own(plot, tmp_path):
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert plot(second) == (figure, second)
    assert not first.has_data()
    assert second.has_data()
    assert drawn(figure, tmp_path)


def test_some_accuracies_are_missing(tmp_path):
    figure, _ = plot_history(history(accuracy=(None, 0.8, None)))
    ((accuracy,), (flatness,)) = curves(figure)
    assert [math.isnan(value) for value in accuracy] == [True, False, True]
    assert flatness == [3.0, 80.0, 40.0]
    assert drawn(figure, tmp_path)


def test_all_accuracies_are_missing(tmp_path):
    figure, _ = plot_history(history(accuracy=(None, None, None)))
    assert curves(figure) == [[], [[3.0, 80.0, 40.0]]]
    assert drawn(figure, tmp_path)
    without = [{"epoch": 0, "relative_flatness": 3.0}]
    assert curves(plot_history(without)[0]) == [[], [[3.0]]]


@pytest.mark.parametrize("flatness", [(3.0, 0.0, 1.0), (3.0, -2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -3.0)])
def test_flatness_that_is_not_positive_has_a_linear_axis(flatness, tmp_path):
    figure, _ = plot_history(history(flatness))
    assert figure.axes[1].get_yscale() == "linear"
    assert curves(figure)[1] == [list(flatness)]
    assert drawn(figure, tmp_path)


@pytest.mark.parametrize("epochs", [0, 1, 60])
@pytest.mark.parametrize("burn_in", [None, 0, 5])
@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_length_of_the_history(epochs, burn_in, tmp_path):
    values = [1.0 + epoch for epoch in range(epochs)]
    figure, ax = plot_history(history(values, values), burn_in=burn_in)
    assert [text.get_text() for text in ax.texts] == (["burn-in"] if burn_in else [])
    assert drawn(figure, tmp_path)
    if epochs == 1:
        low, high = ax.get_xlim()
        assert all(tick == int(tick) for tick in ax.get_xticks() if low <= tick <= high)


# -------------------------------------------------------------------------------------------------------- block traces


def image(figure):
    return torch.as_tensor(figure.axes[0].images[0].get_array().data)


def test_block_traces_as_they_are(tmp_path):
    measured = layer()
    figure, ax = plot_block_traces(measured, sort=False)
    assert isinstance(figure, Figure)
    assert figure.axes[0] is ax
    torch.testing.assert_close(image(figure), measured.block_traces[0])
    assert ax.get_title().startswith("2: Hessian trace")
    assert ax.get_xlabel() == "filter s'"
    assert drawn(figure, tmp_path)


def test_sorting_is_a_permutation_of_filters():
    measured = layer()
    plain, ordered = measured.block_traces[0], image(plot_block_traces(measured)[0])
    order = [int((plain.diagonal() - value).abs().argmin()) for value in ordered.diagonal()]
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(ordered, plain[order][:, order])


def test_filters_that_interact_are_put_side_by_side():
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
def test_few_filters_and_groups(filters, groups, sort, tmp_path):
    measured = layer(filters, groups)
    figure, _ = plot_block_traces(measured, sort=sort)
    shown = image(figure)
    assert shown.shape == (filters, filters)
    size = filters // groups
    outside = torch.block_diag(*[torch.ones(size, size)] * groups) == 0
    assert not shown[outside].any()
    torch.testing.assert_close(shown.trace().item(), measured.hessian_trace)
    torch.testing.assert_close(shown.sum(), measured.block_traces.sum())
    assert drawn(figure, tmp_path)


@pytest.mark.parametrize("sort", [True, False])
def test_block_traces_of_zero(sort, tmp_path):
    measured = layer()
    measured.block_traces.zero_()
    figure, _ = plot_block_traces(measured, sort=sort)
    assert drawn(figure, tmp_path)


def test_colours_are_centred_and_not_paled_by_one_filter():
    measured = layer(filters=20)
    measured.block_traces[0, 0, 0] = 1e6
    heat_map = plot_block_traces(measured)[0].axes[0].images[0]
    low, high = heat_map.get_clim()
    assert low == -high
    assert 0 < high < 1e5
    assert heat_map.cmap(heat_map.norm(0.0))[:3] == pytest.approx(to_rgba("#f7f6f6")[:3], abs=0.02)


# ---------------------------------------------------------------------------------------------------------- matplotlib


@pytest.mark.slow
def test_pyplot_is_not_imported():
    code = """
import sys, torch
from lightning_flatness import measure_flatness
from lightning_flatness.plots import plot_block_traces, plot_history
# torchmetrics imports pyplot where it can; from here on nobody must.
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    del sys.modules[name]
net = torch.nn.Sequential(
    torch.nn.Conv1d(1, 4, 3), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
report = measure_flatness(net, [torch.randn(5, 1, 8)])
for figure, _ in [plot_block_traces(report.layers["0"]), plot_history([{"epoch": 0, "relative_flatness": 3.0}])]:
    figure.canvas.draw()
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "False"]


@pytest.mark.parametrize(
    "plot", [lambda: plot_history(history()), lambda: plot_block_traces(layer())], ids=["history", "traces"]
)
@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_missing_matplotlib_names_the_extra(monkeypatch, plot, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "matplotlib":
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
    with pytest.raises(lf.FlatnessError, match=r"matplotlib: pip install 'lightning-flatness\[plots\]'"):
        plot()
