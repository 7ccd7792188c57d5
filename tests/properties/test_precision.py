"""Models in half precision are measured in float32, or in float64 if so wanted; sums are float64 always."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards

HALVES = [torch.bfloat16, torch.float16]
LAYERS = ["conv1", "conv2", "fc"]


class Net(nn.Module):
    """Two convolutions, BatchNorm, a curved activation before the last and a smooth head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.norm, self.conv2 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3)))


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 2, 8, 8), torch.randint(4, (6,))


def assert_same(one, other, **tolerance):
    for name in LAYERS:
        assert_close(one.layers[name].block_traces, other.layers[name].block_traces, **tolerance)
        assert one.layers[name].relative_flatness == pytest.approx(other.layers[name].relative_flatness, rel=1e-5)


@guards("model/copy.py", "torch.float32 if tensor.dtype in HALF else tensor.dtype", "tensor.dtype")
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision_is_measured_in_float32(half):
    inputs, targets = batch()
    net = Net().to(half)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = lf.measure_flatness(net, [(inputs.to(half), targets)], layers=LAYERS)
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(layer.exact and layer.info.kernel == "parameter" for layer in report.layers.values())
    same = lf.measure_flatness(net.float(), [(inputs.to(half).float(), targets)], layers=LAYERS)
    assert_same(report, same, rtol=0, atol=0)
    assert_close(same.layers["conv2"].block_traces, of_oracle(net, inputs.to(half), targets), rtol=1e-4, atol=1e-7)


@guards("model/copy.py", "dtype or (torch.float32", "(torch.float32")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("wanted", ["float64", torch.float64], ids=str)
def test_any_precision_is_measured_in_float64(dtype, wanted):
    inputs, targets = batch()
    net = Net().to(dtype)
    report = lf.measure_flatness(net, [(inputs.to(dtype), targets)], layers=LAYERS, dtype=wanted)
    exact = of_oracle(net, inputs.to(dtype), targets)
    assert_close(report.layers["conv2"].block_traces, exact, rtol=1e-10, atol=1e-12)


def test_float64_is_measured_in_float32_where_that_is_wanted():
    inputs, targets = batch()
    one = lf.measure_flatness(Net().double(), [(inputs.double(), targets)], layers=LAYERS, dtype="float32")
    other = lf.measure_flatness(Net(), [(inputs, targets)], layers=LAYERS)
    assert_same(one, other, rtol=0, atol=0)


def of_oracle(net, inputs, targets):
    return oracle_block_traces(net.double().eval(), (inputs.double(), targets), "conv2")[None]


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_largest_eigenvalue_of_half_precision(half):
    inputs, targets = batch()
    net = Net().to(half)
    actual = lf.measure_lambda_max(net, [(inputs.to(half), targets)], layers="conv2", dtype="float64")
    same = lf.measure_lambda_max(net.double(), [(inputs.to(half).double(), targets)], layers="conv2")
    assert actual["conv2"].lambda_max == pytest.approx(same["conv2"].lambda_max, rel=1e-10)


def test_parts_of_a_model_may_have_different_precisions():
    inputs, targets = batch()

    class Mixed(Net):
        def forward(self, x):
            features = self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3))
            return self.fc(features.to(self.fc.weight.dtype))

    net = Mixed()
    net.fc.bfloat16()
    report = lf.measure_flatness(net, [(inputs, targets)], layers=LAYERS)
    assert_same(report, lf.measure_flatness(net.float(), [(inputs, targets)], layers=LAYERS), rtol=0, atol=0)
