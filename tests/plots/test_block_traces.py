"""Heat maps of block traces."""

import pytest
import torch
from matplotlib.colors import to_rgba

from lightning_flatness.plots import plot_block_traces


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
