"""Heat maps of block traces."""

import dataclasses

import pytest
import torch

import lightning_flatness as lf
from lightning_flatness.plots import plot_block_traces
from tests.networks import two_convolutions


def test_diagonals_have_no_heat_map():
    net = two_convolutions((1, 4, 6), (3, 3), 3)
    batch = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    diagonal = lf.measure_flatness(net, [batch], measures=["hessian_trace"])
    with pytest.raises(lf.FlatnessError, match=r"'2' has only the diagonal.*'relative_flatness'"):
        plot_block_traces(diagonal.layers["2"])


def image(figure):
    return torch.as_tensor(figure.axes[0].images[0].get_array().data)


def test_block_traces_as_they_are(drawn, layer, heading):
    measured = layer()
    figure, ax = plot_block_traces(measured, sort=False)
    assert figure.axes[0] is ax
    torch.testing.assert_close(image(figure), measured.block_traces[0])
    assert heading(ax).startswith("Layer 2: Hessian trace")
    assert "8 samples; exact (closed form)" in heading(ax)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_leave_the_colours(value, drawn, layer, heading):
    measured = layer()
    limit = float(measured.block_traces.abs().max())
    measured.block_traces[0, 0, 0] = value
    figure, ax = plot_block_traces(measured)
    assert ax.images[0].get_clim()[1] <= limit
    assert "nan" not in heading(ax)
    assert drawn(figure)
    measured.block_traces.fill_(value)
    assert drawn(plot_block_traces(measured)[0])


def test_colours_are_centred_and_not_paled_by_one_filter(layer, heading):
    measured = layer(filters=20)
    measured.block_traces[0, 0, 0] = 1e6
    figure, ax = plot_block_traces(measured)
    heat_map = ax.images[0]
    low, high = heat_map.get_clim()
    assert low == -high
    assert 0 < high < 1e5
    beyond = int((measured.block_traces.abs() > high).sum())
    assert f"99th percentile: {beyond} of 400 entries beyond" in heading(ax)
    assert "up to $10^{6}$" in heading(ax)
    assert heat_map.colorbar.extend == "both"
    figure.canvas.draw()


def test_the_sign_is_seen_in_grey(layer):
    colours = plot_block_traces(layer())[1].images[0].cmap
    greys = [sum(w * c for w, c in zip((0.299, 0.587, 0.114), colours(x)[:3], strict=True)) for x in (0.0, 0.5, 1.0)]
    assert greys[0] < greys[1] - 0.2 < greys[2] - 0.4


def test_what_is_not_exact_has_a_dashed_frame(made_report, heading):
    report = made_report([1.0, 2.0], inexact=[1], sampling=0.25)
    frames = []
    for layer in report.layers.values():
        _, ax = plot_block_traces(layer, data="train")
        frames.append(ax.spines["top"].get_linestyle())
    assert frames[0] in ("-", "solid")
    assert frames[1] not in ("-", "solid")
    assert heading(ax) == (
        "Layer conv1: Hessian trace 3.0 ± 0.5 (2 standard errors) "
        "1,300 samples of training data; not exact (Gauss-Newton) "
        "sorted: filters with large common traces side by side"
    )


def test_the_title_says_what_is_estimated(made_report, heading):
    (layer,) = made_report(
        [1.0], inexact=[0], reason="classes with little probability mass are sampled"
    ).layers.values()
    assert "estimated, with some classes sampled" in heading(plot_block_traces(layer)[1])
    low = dataclasses.replace(layer, info=dataclasses.replace(layer.info, precision="bfloat16"))
    assert "bfloat16 features" in heading(plot_block_traces(low)[1])
