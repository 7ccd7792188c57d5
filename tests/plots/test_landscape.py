"""Figures of landscapes."""

import dataclasses
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_contour, plot_kept_and_recomputed, plot_line, plot_surface


def landscape(axes="random", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(8, 2), torch.arange(8) % 3
    return lf.loss_landscape(model, [batch], axes=axes, steps=5, **options)


def with_losses(result, change):
    losses = result.losses.clone()
    change(losses)
    return dataclasses.replace(result, losses=losses)


def drawn(figure, path):
    assert isinstance(figure, Figure)
    figure.savefig(path / "figure.png", dpi=50)
    return (path / "figure.png").stat().st_size > 1000


def test_a_line_with_accuracy_and_gaps(tmp_path):
    def spoil(losses):
        losses[0], losses[3] = math.nan, math.inf

    result = with_losses(landscape(["random"]), spoil)
    figure, ax = plot_line(result)
    assert_close(torch.as_tensor(ax.lines[0].get_ydata()), result.losses, equal_nan=True)
    assert_close(torch.as_tensor(figure.axes[1].lines[0].get_ydata()), 100 * result.accuracies)
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert bands == [(-1.0, -0.75), (0.25, 0.75)]
    assert drawn(figure, tmp_path)


def test_a_cap_is_drawn_and_kept_out_of_the_result():
    result = landscape(["random"])
    cap = float(result.losses.median())
    before = result.losses.clone()
    _, ax = plot_line(result, cap=cap)
    assert_close(torch.as_tensor(ax.lines[0].get_ydata()), before.clamp(max=cap))
    assert_close(result.losses, before, rtol=0, atol=0)
    with pytest.raises(lf.FlatnessError, match="above the lowest loss"):
        plot_line(result, cap=-1.0)


def test_contours_with_a_hole_and_a_trajectory(tmp_path):
    def spoil(losses):
        losses[0, 0] = math.nan

    trajectory = torch.tensor([[0.5, 0.5], [0.2, 0.1], [0.0, 0.0]])
    figure, ax = plot_contour(with_losses(landscape(), spoil), trajectory=trajectory)
    assert ax.patch.get_hatch() == "///"
    assert_close(torch.as_tensor(ax.lines[0].get_xydata()).float(), trajectory)
    assert ax.lines[1].get_xydata().tolist() == [[0.0, 0.0]]
    assert drawn(figure, tmp_path)
    assert plot_contour(landscape())[1].patch.get_hatch() is None
    with pytest.raises(lf.FlatnessError, match="trajectory has shape"):
        plot_contour(landscape(), trajectory=torch.ones(3))


@pytest.mark.parametrize("log", [False, True])
def test_surfaces(tmp_path, log):
    def spoil(losses):
        losses[0, 0] = math.nan

    figure, ax = plot_surface(with_losses(landscape(), spoil), log=log, cap=5.0)
    assert ax.get_zlabel() == ("log₁₀ loss" if log else "loss")
    assert drawn(figure, tmp_path)
    negative = with_losses(landscape(), lambda losses: losses.neg_())
    with pytest.raises(lf.FlatnessError, match="not positive"):
        plot_surface(negative, log=True)


def test_kept_and_recomputed_in_equal_colours(tmp_path):
    pair = [landscape(batch_norm=name) for name in ("kept", "recomputed")]
    figure, (left, right) = plot_kept_and_recomputed(*pair)
    assert left.collections[0].get_clim() == right.collections[0].get_clim()
    assert drawn(figure, tmp_path)
    figure, ax = plot_kept_and_recomputed(*[landscape(["random"], batch_norm=name) for name in ("kept", "recomputed")])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["statistics kept", "statistics recomputed"]
    with pytest.raises(lf.FlatnessError, match="'recomputed' and 'kept'"):
        plot_kept_and_recomputed(*pair[::-1])


def test_flat_landscapes_and_wrong_ones():
    flat = with_losses(landscape(), lambda losses: losses.fill_(1.0))
    assert plot_contour(flat)
    assert plot_surface(flat)
    with pytest.raises(lf.FlatnessError, match="plot_contour draws a LandscapeResult with 2"):
        plot_contour(landscape(["random"]))
    with pytest.raises(lf.FlatnessError, match="no finite loss"):
        plot_line(with_losses(landscape(["random"]), lambda losses: losses.fill_(math.nan)))
