import math

import pytest
import torch
from matplotlib.figure import Figure

import lightning_flatness as lf
from lightning_flatness.results import LayerFlatness, LayerInfo
from tests.networks import two_convolutions


@pytest.fixture
def drawn(tmp_path):
    """Save a figure, and say whether the file has something in it."""

    def save(figure):
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / "figure.png", dpi=50)
        return (tmp_path / "figure.png").stat().st_size > 1000

    return save


@pytest.fixture
def layer():
    """Measure the last convolution of a small network."""

    def measured(filters=6, groups=1):
        net = two_convolutions((1, 4, filters), (3, 3), 3, groups=groups)
        return lf.measure_flatness(net, [(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)]).layers["2"]

    return measured


@pytest.fixture
def made_report():
    """A report of layers with the given relative flatness, made by hand."""

    def made(flatness=(2.0, 0.5, 8.0), inexact=(), sampling=None, estimate=None, data="", reason="logits curve"):
        layers = {}
        for index, value in enumerate(flatness):
            exact = index not in inexact
            info = LayerInfo(
                name=f"conv{index}",
                kind="Conv2d",
                num_filters=3,
                patch_length=9,
                groups=1,
                classifier=None,
                method="gauss_newton",
                exact=exact,
                reason="" if exact else reason,
                kernel="parameter",
                deviation=0.0,
            )
            layers[info.name] = LayerFlatness(
                block_traces=torch.eye(3).double()[None],
                filter_traces=torch.ones(3).double(),
                filter_flatness=torch.ones(3).double(),
                hessian_trace=3.0,
                relative_flatness=value,
                neuronwise_flatness=math.nan,
                layerwise_flatness=1.0,
                weight_norm=1.0,
                num_samples=1300,
                standard_errors={} if estimate is None else {"relative_flatness": estimate},
                info=info,
                sampling_errors={} if sampling is None else {"relative_flatness": sampling, "hessian_trace": sampling},
            )
        return lf.FlatnessReport(layers, data=data)

    return made


@pytest.fixture
def legend():
    """The words of a legend."""

    def words(ax):
        return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []

    return words


@pytest.fixture
def heading():
    """The title of axes in one line."""
    return lambda ax: " ".join(ax.get_title(loc="left").split())
