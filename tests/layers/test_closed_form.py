"""Numbers of the closed form, to the last digits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("confidence", [1.0, 30.0, 60.0])
def test_diagonals_alone_keep_their_digits(classes, confidence):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    net, x = net.double(), torch.randn(6, 2, 6, 6).double()
    with torch.no_grad():
        net[4].bias[0] += confidence
    whole = lf.measure_flatness(net, [x], tolerance=0).layers["0"]
    part = lf.measure_flatness(net, [x], measures=["hessian_trace"]).layers["0"]
    assert_close(part.filter_traces, whole.filter_traces, rtol=1e-12, atol=0)
    default = lf.measure_flatness(net, [x]).layers["0"]
    assert_close(default.filter_traces, whole.filter_traces, rtol=1e-12, atol=0)
