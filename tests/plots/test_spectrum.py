"""What the figures of spectra show."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_density, plot_eigenvalues
from lightning_flatness.plots.canvas import overlays


def spectrum(num_steps, num_probes, top_k=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(20, 5), torch.randint(3, (20,))
    return lf.hessian_spectrum(net, [batch], top_k=top_k, num_steps=num_steps, num_probes=num_probes)


@pytest.fixture(scope="module")
def result():
    return spectrum(15, 3)


def test_density(result):
    figure, ax = plot_density(result, sigma=0.01)
    grid, density = result.density(sigma=0.01)
    curve, _, ticks = ax.get_lines()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "range over 3 probes",
        "density, σ = 0.01",
        "4 largest eigenvalues",
    ]
    assert_close(torch.tensor(curve.get_xdata()), grid)
    shown = density > density.max() / 1e6
    assert_close(torch.tensor(curve.get_ydata())[shown], density[shown])
    assert_close(torch.tensor(ticks.get_xdata()), result.eigenvalues)
    assert result.kind in ax.get_title(loc="left")
    again, other = plot_density(dataclasses.replace(result, eigenvalues=result.eigenvalues[:0]), ax=ax)
    assert (again, other) == (figure, ax)


def test_eigenvalues_over_epochs(result):
    later = dataclasses.replace(result, eigenvalues=result.eigenvalues[:2] / 2)
    _, ax = plot_eigenvalues([(3, later), (1, result)])
    lines = ax.get_lines()
    assert list(lines[0].get_xdata()) == [1, 3]
    expected = torch.stack([result.eigenvalues[0], later.eigenvalues[0]])
    assert_close(torch.tensor(lines[0].get_ydata()).double(), expected)
    assert torch.tensor(lines[3].get_ydata())[1].isnan()  # fewer were measured then
    with pytest.raises(lf.FlatnessError, match="one"):
        plot_eigenvalues([])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(result, value):
    odd = dataclasses.replace(result, ritz_values=result.ritz_values.clone(), eigenvalues=result.eigenvalues.clone())
    odd.ritz_values[0, 0] = odd.eigenvalues[0] = value
    with pytest.raises(lf.FlatnessError, match="not finite, so it has no density to draw"):
        plot_density(odd)
    figure, ax = plot_eigenvalues([(0, result), (1, odd)])
    figure.draw_without_rendering()
    largest = [value for value in ax.get_ylim() if value > 0]
    assert largest == [2 * float(result.eigenvalues[0])]


def test_a_density_needs_a_width(result):
    with pytest.raises(lf.FlatnessError, match="sigma=0"):
        plot_density(result, sigma=0)


def test_zero_spectra_are_drawn(result):
    zero = dataclasses.replace(result, eigenvalues=torch.zeros(2), ritz_values=torch.zeros(1, 3).double())
    zero = dataclasses.replace(zero, ritz_weights=torch.full((1, 3), 1 / 3).double())
    plot_density(zero)
    plot_eigenvalues([(0, zero)])


@pytest.mark.parametrize(("num_steps", "num_probes"), [(1, 1), (1, 4), (3, 2), (15, 3)])
def test_all_eigenvalues_and_ritz_values_are_in_the_picture(tmp_path, num_steps, num_probes):
    result = spectrum(num_steps, num_probes)
    figure, ax = plot_density(result)
    low, high = ax.get_xlim()
    for values in (result.eigenvalues, result.ritz_values):
        assert low < values.min() <= values.max() < high
    heights = torch.tensor(ax.get_lines()[0].get_ydata())
    assert heights.max() > 1e3 * heights.min(), "the Gaussians are wide enough to be seen"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "constrained_layout")
        figure.savefig(tmp_path / "figure.png", dpi=50)
        ax.set_xlim(1e6, 1e6 + 1)  # nor does anything hang outside when someone looks closer
        figure.savefig(tmp_path / "figure.png", dpi=50, bbox_inches="tight")


def test_one_of_each_is_in_the_singular(heading, legend):
    one = spectrum(1, 1, top_k=1)
    assert "1 probe of 1 Lanczos step," in " ".join(str(one).split())
    _, ax = plot_density(one)
    assert "; 1 probe of 1 step; " in heading(ax)
    assert legend(ax)[-1] == "largest eigenvalue"
    _, ax = plot_density(spectrum(3, 2, top_k=2))
    assert "; 2 probes of 3 steps; " in heading(ax)
    assert legend(ax)[-1] == "2 largest eigenvalues"


def test_the_title_says_what_was_measured_and_how_surely(result, heading):
    known = dataclasses.replace(result, trace=32.37, trace_stderr=4.1, k_hn=0.361, loss=1.25, converged=False)
    known = dataclasses.replace(known, spread={**result.spread, "k_hn": 0.07})
    words = heading(plot_density(known, data="train")[1])
    assert "cross_entropy 1.25 on 20 samples of training data" in words
    assert "trace 32 ± 4, K_Hn = 0.36 ± 0.07" in words
    assert words.endswith("criteria over probes; eigenvalues have not converged")


def test_the_band_is_the_range_over_the_probes(result):
    _, ax = plot_density(result, sigma=0.01)
    vertices = torch.tensor(ax.collections[0].get_paths()[0].vertices)
    grid, density = result.density(sigma=0.01)
    at = int(density.argmax())
    edges = vertices[(vertices[:, 0] - grid[at]).abs() < 1e-9][:, 1]
    assert edges.min() < density[at] < edges.max()


def test_spectra_that_are_compared_share_the_axes(result, legend, heading):
    wide = dataclasses.replace(result, ritz_values=3 * result.ritz_values, eigenvalues=3 * result.eigenvalues)
    _, ax = plot_density(wide, label="wide", sigma=0.01, data="val")
    limits = ax.get_xlim()
    plot_density(result, label="narrow", color="black", sigma=0.01, ax=ax)
    assert ax.get_xlim() == limits, "the first spectrum is still seen as a whole"
    assert [words.partition(":")[0] for words in legend(ax)] == ["wide", "narrow"]
    assert "20 samples of validation data" in legend(ax)[0]
    assert heading(ax).endswith("3 probes of 15 steps; σ = 0.01")
    first, second = overlays(ax, "density")
    assert first.get_color() != second.get_color() == "black"
    assert first.get_marker() != second.get_marker()


def test_a_gauss_newton_spectrum_is_dashed(result):
    _, ax = plot_density(dataclasses.replace(result, matrix="gauss_newton"))
    assert ax.get_lines()[0].get_linestyle() == "--"
    assert "Gauss-Newton matrix" in ax.get_xlabel()


def test_eigenvalues_that_have_not_converged_are_hollow(result, heading):
    rough = dataclasses.replace(result, converged=False)
    _, ax = plot_eigenvalues([(0, result), (1, rough)], data="train")
    solid, dashed = ax.get_lines()[:2]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert dashed.get_markevery() == [1]
    assert heading(ax) == (
        "Largest eigenvalues of the Hessian; 20 samples of training data hollow: eigenvalues have not converged"
    )


@pytest.mark.parametrize(("top_k", "named"), [(1, []), (2, ["λ2"]), (4, ["λ2 to λ4"])])
def test_every_eigenvalue_is_in_the_legend(result, top_k, named):
    some = dataclasses.replace(result, eigenvalues=result.eigenvalues[:top_k])
    _, ax = plot_eigenvalues([(0, some), (1, some)])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["λ1, the largest", *named, "lowest Ritz value (bounds the lowest eigenvalue)"]


def test_a_single_epoch(result):
    figure, ax = plot_eigenvalues([(3, result)])
    figure.canvas.draw()
    assert ax.get_xlim() == (2.5, 3.5)
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [3]
