"""Axes to draw into, and matplotlib: where it is imported, and where it is missing."""

import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from torch import nn

import lightning_flatness as lf
from lightning_flatness import plots
from lightning_flatness.plots import plot_block_traces, plot_history
from lightning_flatness.plots.canvas import set_heading

HISTORY = [{"epoch": 0, "accuracy": 0.5, "relative_flatness": 3.0}]


@pytest.mark.parametrize(
    "plot",
    [lambda layer, ax: plot_history(HISTORY, ax=ax), lambda layer, ax: plot_block_traces(layer(), ax=ax)],
    ids=["history", "traces"],
)
def test_axes_of_ones_own(plot, layer, drawn):
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert plot(layer, second) == (figure, second)
    assert not first.has_data()
    assert second.has_data()
    assert drawn(figure)


def test_a_heading_keeps_the_line_that_a_legend_needs():
    ax = Figure().subplots()
    set_heading(ax, "title", "", "\u00a0")
    assert ax.get_title(loc="left") == "title\n\u00a0"


@pytest.mark.slow
def test_pyplot_is_not_imported():
    code = """
import sys, torch
from lightning_flatness import measure_flatness
from lightning_flatness.plots import plot_block_traces, plot_history
from lightning_flatness.plots.canvas import set_heading
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
    "plot", [lambda layer: plot_history(HISTORY), lambda layer: plot_block_traces(layer())], ids=["history", "traces"]
)
@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_missing_matplotlib_is_named(monkeypatch, layer, plot, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "matplotlib":
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
    with pytest.raises(lf.FlatnessError, match="matplotlib: pip install matplotlib"):
        plot(layer)


@pytest.mark.parametrize(
    "plot",
    ["plot_layers", "plot_block_traces", "plot_density", "plot_eigenvalues", "plot_history", "plot_layer_history",
     "plot_comparison", "plot_gap", "plot_line", "plot_contour", "plot_surface"],
)  # fmt: skip
def test_something_else_is_refused(plot):
    with pytest.raises(lf.FlatnessError, match=" is a Linear"):
        getattr(plots, plot)(nn.Linear(2, 3))


def test_eigenvalues_without_their_epochs_are_refused():
    with pytest.raises(lf.FlatnessError, match=r"is a Linear; give pairs \(epoch, SpectrumResult\)"):
        plots.plot_eigenvalues([nn.Linear(2, 3)])
