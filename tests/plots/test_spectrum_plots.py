"""What the figures of spectra show."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_density, plot_eigenvalues


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(20, 5), torch.randint(3, (20,))
    return lf.hessian_spectrum(net, [batch], top_k=4, num_steps=15, num_probes=3)


def test_density(result):
    figure, ax = plot_density(result, sigma=0.01)
    grid, density = result.density(sigma=0.01)
    curve, _, ticks = ax.get_lines()
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


def test_a_density_needs_a_width(result):
    with pytest.raises(lf.FlatnessError, match="sigma=0"):
        plot_density(result, sigma=0)


def test_zero_spectra_are_drawn(result):
    zero = dataclasses.replace(result, eigenvalues=torch.zeros(2), ritz_values=torch.zeros(1, 3).double())
    zero = dataclasses.replace(zero, ritz_weights=torch.full((1, 3), 1 / 3).double())
    plot_density(zero)
    plot_eigenvalues([(0, zero)])
