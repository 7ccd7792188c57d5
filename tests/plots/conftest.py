import pytest
import torch
from matplotlib.figure import Figure

import lightning_flatness as lf
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
