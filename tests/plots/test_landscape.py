"""Figures of landscapes."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_contour, plot_kept_and_recomputed, plot_line, plot_surface, shared_levels
from lightning_flatness.plots.canvas import overlays
from lightning_flatness.plots.surface import _refined


def landscape(axes="random", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(8, 2), torch.arange(8) % 3
    return lf.loss_landscape(model, [batch], axes=axes, steps=5, **options)


def with_losses(result, values):
    """The result with other losses, by point."""
    losses = result.losses.clone()
    for point, value in values.items():
        losses[point] = value
    return dataclasses.replace(result, losses=losses)


def partial(result, *, not_finite=()):
    """Only the middle was computed."""
    computed = torch.zeros_like(result.computed)
    computed[(slice(1, 4),) * result.losses.ndim] = True
    losses = result.losses.masked_fill(~computed, math.nan)
    for point in not_finite:
        losses[point] = math.inf
    return dataclasses.replace(result, losses=losses, computed=computed)


def gaps_of(ax):
    return [collection.get_hatch() for collection in ax.collections if collection.get_hatch()]


def colour_bar(figure):
    """The colour bar of the first axes."""
    return figure.axes[0].child_axes[0]._colorbar


def ticks_of(figure):
    """Labels of the colour bar that are seen, and its own label."""
    figure.canvas.draw()
    axis = colour_bar(figure).ax.yaxis
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label.get_text() for at, label in labels if low <= at <= high], axis.get_label_text()


def test_a_line_with_accuracy_and_gaps(drawn):
    result = with_losses(landscape(["random"]), {0: math.nan, 3: math.inf})
    figure, ax = plot_line(result)
    assert_close(torch.as_tensor(ax.lines[0].get_ydata()), result.losses, equal_nan=True)
    assert_close(torch.as_tensor(figure.axes[1].lines[0].get_ydata()), 100 * result.accuracies)
    bands = [
        tuple(patch.get_path().transformed(patch.get_patch_transform()).get_extents().intervalx.tolist())
        for patch in ax.patches
    ]
    assert bands == [(-1.0, -0.75), (0.25, 0.75)]
    assert drawn(figure)


def test_a_cap_is_drawn_and_kept_out_of_the_result():
    result = landscape(["random"])
    cap = float(result.losses.median())
    before = result.losses.clone()
    _, ax = plot_line(result, cap=cap)
    assert_close(torch.as_tensor(ax.lines[0].get_ydata()), before.clamp(max=cap))
    assert_close(result.losses, before, rtol=0, atol=0)
    with pytest.raises(lf.FlatnessError, match="above the lowest loss"):
        plot_line(result, cap=-1.0)


def test_a_cap_is_drawn_in_place_of_infinite_losses(legend):
    _, ax = plot_line(with_losses(landscape(["random"]), {1: math.inf, 2: math.nan}), cap=9.0)
    assert ax.lines[0].get_ydata()[1] == 9.0
    assert len(ax.patches) == 1
    assert legend(ax) == ["loss", "not finite"]


def test_contours_with_a_hole_and_a_trajectory(drawn):
    trajectory = torch.tensor([[0.5, 0.5], [0.2, 0.1], [0.0, 0.0]])
    figure, ax = plot_contour(with_losses(landscape(), {(0, 0): math.nan}), trajectory=trajectory)
    assert gaps_of(ax) == ["///"]
    assert_close(torch.as_tensor(ax.lines[0].get_xydata()).float(), trajectory)
    assert ax.lines[-1].get_xydata().tolist() == [[0.0, 0.0]]
    assert drawn(figure)
    assert gaps_of(plot_contour(landscape())[1]) == []
    for wrong in (torch.ones(3), torch.zeros(0, 2)):
        with pytest.raises(lf.FlatnessError, match="trajectory has shape"):
            plot_contour(landscape(), trajectory=wrong)


@pytest.mark.parametrize("log", [False, True])
def test_surfaces(drawn, log):
    figure, ax = plot_surface(with_losses(landscape(), {(0, 0): math.nan}), log=log, cap=5.0)
    assert ax.get_zlabel() == "loss"
    assert figure.axes[1].get_ylabel() == "loss"
    assert drawn(figure)
    negative = with_losses(landscape(), {...: -landscape().losses})
    with pytest.raises(lf.FlatnessError, match="not positive"):
        plot_surface(negative, log=True)


def test_gaps_do_not_grow_between_facets():
    refined = _refined(torch.tensor([math.nan, 1.0, 3.0]), 2)
    assert_close(refined, torch.tensor([math.nan, math.nan, 1.0, 2.0, 3.0]), equal_nan=True)


def test_kept_and_recomputed_in_equal_colours(drawn):
    pair = [landscape(batch_norm=name) for name in ("kept", "recomputed")]
    figure, (left, right) = plot_kept_and_recomputed(*pair)
    assert left.collections[0].get_clim() == right.collections[0].get_clim()
    assert drawn(figure)
    figure, ax = plot_kept_and_recomputed(*[landscape(["random"], batch_norm=name) for name in ("kept", "recomputed")])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["statistics kept", "statistics recomputed"]
    with pytest.raises(lf.FlatnessError, match="'recomputed' and 'kept'"):
        plot_kept_and_recomputed(*pair[::-1])
    for options in ({"seed": 1}, {"normalize": "none"}, {"span": 0.5}):
        with pytest.raises(lf.FlatnessError, match="must have the same points: the same axes"):
            plot_kept_and_recomputed(pair[0], landscape(batch_norm="recomputed", **options))


def test_flat_landscapes_and_wrong_ones():
    flat = with_losses(landscape(), {...: 1.0})
    assert plot_contour(flat)
    assert plot_surface(flat)
    with pytest.raises(lf.FlatnessError, match=r"plot_contour needs a landscape on a plane \(two axes\)"):
        plot_contour(landscape(["random"]))
    with pytest.raises(lf.FlatnessError, match=r"plot_line needs a landscape on a line \(one axis\); this one has two"):
        plot_line(landscape())
    with pytest.raises(lf.FlatnessError, match="this is a dict"):
        plot_line({})
    with pytest.raises(lf.FlatnessError, match="no finite loss"):
        plot_line(with_losses(landscape(["random"]), {...: math.nan}))


def test_what_was_not_computed_looks_other_than_what_is_not_finite(drawn, legend):
    for result, hatches, reasons in (
        (partial(landscape()), ["..."], ["not computed"]),
        (partial(landscape(), not_finite=[(1, 1)]), ["///", "..."], ["not finite", "not computed"]),
    ):
        figure, ax = plot_contour(result)
        assert gaps_of(ax) == hatches
        assert legend(ax) == [*reasons, "model"]
        assert drawn(figure)
    _, ax = plot_surface(result)
    assert ax.texts[0].get_text() == "holes: 1 not finite, 16 not computed, of 25 points"
    assert not plot_surface(landscape())[1].texts
    line = partial(landscape(["random"]), not_finite=[1])
    figure, ax = plot_line(line)
    assert legend(ax) == ["loss", "not finite", "not computed"]
    assert [patch.get_hatch() for patch in ax.patches] == ["///", "...", "..."]
    assert legend(plot_line(landscape(["random"]))[1]) == ["loss"]
    plot_line(line, label="again", ax=ax)
    assert sorted(ax.get_legend_handles_labels()[1]) == ["again", "loss", "not computed", "not finite"]


def test_every_cell_with_a_gap_is_marked_by_its_reason():
    result = partial(landscape(), not_finite=[(1, 1)])
    _, ax = plot_contour(result)
    starts = result.coordinates[0][:-1].tolist()
    cells = set(itertools.product(starts, starts))
    middle, around_the_point = (set(itertools.product(some, repeat=2)) for some in (starts[1:3], starts[:2]))
    hatched = [collection for collection in ax.collections if collection.get_hatch()]
    corners = [{tuple(path.vertices.min(0).tolist()) for path in cells.get_paths()} for cells in hatched]
    assert corners == [around_the_point, cells - middle - around_the_point]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.984, 1.024), (0.989, 0.989 + 1e-9), (1e-8, 3e-8), (-3.0, 4.0), (0.5, 400.0), (1e3, 1e3 + 1e-4), (3e-9, 2e3)],
)
@pytest.mark.filterwarnings("error")
def test_labels_of_the_colour_bar_tell_its_levels_apart(low, high):
    losses = torch.linspace(low, high, 25, dtype=torch.float64).reshape(5, 5)
    figure, _ = plot_contour(dataclasses.replace(landscape(), losses=losses))
    labels, text = ticks_of(figure)
    assert 4 <= len(labels) == len(set(labels))
    assert text.startswith("loss")
    if high - low < 1e-8 < low:
        assert text == "loss\n(× 1e−10 + 9.89e−1)"


def test_ticks_of_given_levels_are_round():
    levels = torch.tensor([1.0, 1.0001, 1.0002, 20.0])
    figure, _ = plot_contour(landscape(), levels=levels)
    assert ticks_of(figure)[0] == ["1", "2", "5", "10", "20"]


@pytest.mark.parametrize("value", [1.25, 0.0, -3.0, 1.25 + 1e-15 * torch.arange(25).double().reshape(5, 5)])
@pytest.mark.filterwarnings("error")
def test_constant_landscapes_have_one_label(value, drawn):
    flat = dataclasses.replace(landscape(), losses=torch.zeros(5, 5).double() + value)
    figure, _ = plot_contour(flat)
    assert [float(label.replace("−", "-")) for label in ticks_of(figure)[0]] == [round(float(flat.losses[0, 0]), 5)]
    figure, ax = plot_surface(flat)
    assert drawn(figure)
    assert_close(ax.get_zticks().tolist(), [float(flat.losses.min())])


@pytest.mark.filterwarnings("error")
def test_too_few_points_for_contours(drawn):
    middle = landscape().losses[2, 2]
    result = with_losses(landscape(), {...: math.nan, (2, 2): middle})
    figure, ax = plot_contour(result)
    assert not ax.child_axes  # no colour bar
    assert ax.texts[0].get_text() == f"too few points for contours: 1 of 25,\nlowest loss {float(middle):.6g}"
    assert drawn(figure)
    assert drawn(plot_surface(result)[0])


def test_the_colour_bar_goes_on_where_losses_are_above_the_cap():
    result = landscape()
    for cap, more in ((2 * float(result.losses.max()), "neither"), (float(result.losses.median()), "max")):
        figure, _ = plot_contour(result, cap=cap)
        assert colour_bar(figure).extend == more
        ticks = colour_bar(figure).ax.yaxis.get_majorticklocs()
        assert float(result.losses.min()) <= min(ticks) < max(ticks) <= min(cap, float(result.losses.max()))
    infinite = with_losses(result, {0: math.inf})
    figure, _ = plot_contour(infinite, cap=2 * float(result.losses.max()))
    assert colour_bar(figure).extend == "max"


def test_the_ends_of_a_trajectory_are_marked(legend):
    points = torch.tensor([[0.5, 0.5], [0.2, 0.1], [0.1, 0.0]])
    _, ax = plot_contour(landscape(), trajectory=points)
    assert legend(ax) == ["start", "end", "model"]
    start, end = ax.lines[1:3]
    assert_close(torch.tensor(start.get_xydata()[0]).float(), points[0])
    assert_close(torch.tensor(end.get_xydata()[0]).float(), points[-1])
    assert start.get_markerfacecolor() != end.get_markerfacecolor()
    outside = torch.cat([torch.tensor([[3.0, 0.0]]), points])
    assert legend(plot_contour(landscape(), trajectory=outside)[1]) == ["end", "model"]


@pytest.mark.parametrize("span", [1.0, 1e20, 1e-9])
def test_labels_along_a_line_do_not_touch(span):
    result = landscape(["random"])
    figure, ax = plot_line(dataclasses.replace(result, coordinates=(span * result.coordinates[0],)))
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(one.x1 + 10 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_surface_of_few_points_has_many_colours():
    torch.manual_seed(0)
    losses = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double()
    corners = dataclasses.replace(
        landscape(), losses=losses, computed=losses > 0, coordinates=(torch.tensor([-1.0, 1.0]).double(),) * 2
    )
    figure, ax = plot_surface(corners)
    figure.canvas.draw()
    colours = {tuple(map(float, colour)) for colour in ax.collections[0].get_facecolor()}
    assert len(colours) > 20
    assert ax.get_zlim()[1] == 5.0


def test_offsets_and_factors_are_in_the_labels_of_a_surface():
    result = landscape()
    tiny = tuple(1e-9 * axis for axis in result.coordinates)
    losses = torch.linspace(0.989, 0.989 + 1e-8, 25, dtype=torch.float64).reshape(5, 5)
    figure, ax = plot_surface(dataclasses.replace(result, coordinates=tiny, losses=losses))
    assert ax.get_xlabel() == "random direction 1\n(× 1e−9)"
    assert ax.get_zlabel() == "loss\n(× 1e−8 + 9.89e−1)"
    figure.canvas.draw()
    assert not any(axis.get_offset_text().get_visible() for axis in (ax.xaxis, ax.yaxis, ax.zaxis))


def test_titles_name_loss_samples_normalisation_and_statistics(heading):
    words = "cross_entropy, mean over 8 samples of training data normalised by filter (L2); BatchNorm statistics kept"
    for axes, plot in ((["random"], plot_line), ("random", plot_contour), ("random", plot_surface)):
        assert heading(plot(landscape(axes), data="train")[1]) == words
    for plot in (plot_contour, plot_surface):
        assert heading(plot(landscape(normalize="none"), label="SGD")[1]) == (
            "SGD cross_entropy, mean over 8 samples directions not normalised; BatchNorm statistics kept"
        )


def test_both_axes_of_a_plane_have_one_scale(drawn):
    figure, ax = plot_contour(landscape(span=[(-1.0, 2.0), (-1.0, 1.0)]))
    assert drawn(figure)
    box, bar = ax.bbox, ax.child_axes[0].bbox
    assert box.height / box.width == pytest.approx(2 / 3)
    assert (bar.y0, bar.y1) == pytest.approx((box.y0, box.y1)), "the colour bar is as high as the plane"
    assert plot_contour(landscape(span=[(-9.0, 9.0), (-1.0, 1.0)]))[1].get_box_aspect() is None


def test_planes_are_compared_at_shared_levels(legend, heading, drawn):
    pair = [landscape(batch_norm=name) for name in ("kept", "recomputed")]
    levels = shared_levels(*pair)
    losses = torch.stack([result.losses for result in pair])
    assert_close(levels[[0, -1]], torch.stack([losses.min(), losses.max()]))
    figure, ax = plot_contour(pair[0], levels=levels, label="one", color="#0b3c6f", data="val")
    plot_contour(pair[1], levels=levels, label="other", color="#d1571a", data="val", ax=ax)
    assert legend(ax) == ["one", "other", "model"]
    strokes = [line.get_linestyle() for line in ax.lines if line.get_label() in ("one", "other")]
    assert strokes == ["-", "--"], "the planes differ in grey, too"
    assert heading(ax).endswith(
        "normalised by filter (L2); BatchNorm statistics kept / BatchNorm statistics recomputed"
    )
    assert not ax.child_axes
    assert drawn(figure)
    wide = landscape(span=2.0)
    plot_contour(wide, color="black", ax=ax)
    plot_contour(pair[0], color="black", ax=ax)
    assert (*ax.get_xlim(), *ax.get_ylim()) == (-2, 2, -2, 2), "all planes are seen"


def test_a_line_names_its_ends_and_its_curves(legend):
    figure, ax = plot_line(landscape(["random"], span=(-0.5, 1.5)), ends=("SGD", "SAM"))
    assert [(text.get_text(), text.xy[0]) for text in ax.texts] == [("SGD", 0), ("SAM", 1)]
    for panel in figure.axes:
        assert [line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == ":"] == [0, 1]
    assert [legend(panel) for panel in figure.axes] == [["loss"], ["accuracy"]]
    assert [text.get_text() for text in plot_line(landscape(["random"], span=(0.5, 1.5)))[1].texts] == []


def test_lines_that_are_compared_differ_in_colour_and_marker(legend):
    _, ax = plot_line(landscape(["random"]), label="one")
    plot_line(landscape(["random"]), label="other", ax=ax)
    plot_line(landscape(["random"]), label="red", color="red", ax=ax)
    assert legend(ax) == ["one", "other", "red"]
    first, second, third = overlays(ax, "loss")
    assert first.get_color() != second.get_color()
    assert len({first.get_marker(), second.get_marker(), third.get_marker()}) == 3
    assert third.get_color() == "red"


def test_a_logarithmic_surface_is_labelled_with_losses():
    result = with_losses(landscape(), {...: torch.logspace(-2, 2, 25).double().reshape(5, 5)})
    figure, ax = plot_surface(result, log=True)
    figure.canvas.draw()
    words = [label.get_text() for label in ax.get_zticklabels()]
    assert words == [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert {"0.01", "0.1", "1", "10", "100"} >= set(words)
    assert len(words) >= 4
