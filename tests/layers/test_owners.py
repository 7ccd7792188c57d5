"""The layer that a kernel belongs to, if it is put together from parameters or kept in a list."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.guarding import guards
from tests.layers.own_layers import Bank, Listed, LowRank, Own, Standardised, Together, X, Y, network


@pytest.mark.parametrize("layers", ["last", "2", "all"])
def test_a_convolution_of_ones_own_is_measured(layers):
    net = network(Own(4, 5))
    layer = lf.measure_flatness(net, [(X, Y)], layers=layers).layers["2"]
    assert (layer.exact, layer.info.kernel, layer.info.kind) == (True, "parameter", "Own")
    assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), "2"), rtol=1e-9, atol=1e-12)


def test_a_kernel_in_a_list_is_that_of_the_module_with_the_list():
    net = network(Listed(4, 5))
    layer = lf.measure_flatness(net, [(X, Y)], layers="all").layers["2"]
    assert (layer.exact, layer.info.kernel) == (True, "parameter")
    same = network(nn.Conv2d(4, 5, 3, bias=False))
    same[0], same[6], same[2].weight = net[0], net[6], net[2].kernels[0]
    assert_close(layer.block_traces[0], oracle_block_traces(same, (X, Y), "2"), rtol=1e-9, atol=1e-12)
    assert list(lf.measure_flatness(network(Listed(4, 5, scale=2)), [(X, Y)], layers="all").left_out) == ["2"]


@pytest.mark.parametrize("kind", [Standardised, LowRank, Together, Bank])
def test_a_computed_kernel_is_that_of_its_module(kind):
    net = network(kind(4, 5))
    report = lf.measure_flatness(net, [(X, Y)])
    assert report.layers["2"].info.kernel == "effective"
    same = network(nn.Conv2d(4, 5, 3))
    same[0], same[6] = net[0], net[6]
    with torch.no_grad():
        kernel = net[2](torch.eye(36).double().view(36, 4, 3, 3)) - net[2](torch.zeros(1, 4, 3, 3).double())
        same[2].weight.copy_(kernel.flatten(1).T.reshape(5, 4, 3, 3))
        same[2].bias.copy_(net[2](torch.zeros(1, 4, 3, 3).double()).flatten())
    assert_close(report.hessian_trace, lf.measure_flatness(same, [(X, Y)]).hessian_trace, rtol=1e-9, atol=0)


class Masked(nn.Module):
    """A fixed filter, made from the signs of a kernel, after a layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)

    def forward(self, x):
        mask = (self.conv.weight.detach()[:, :1, :2, :2] != 0).to(x)
        return F.conv2d(self.conv(x), mask / 4, groups=5)


@guards("layers/tracing.py", "if one.is_floating_point() or one.is_complex()", "if True")
def test_a_filter_made_from_comparisons_is_no_trained_kernel():
    net = network(Masked())
    assert_matches_oracle(net, (X, Y), layer="2.conv")
    assert list(lf.measure_flatness(net, [(X, Y)]).layers) == ["2.conv"]


class Reused(nn.Module):
    """A network that may apply a kernel once more, as a linear map of its features."""

    def __init__(self, layer, again):
        super().__init__()
        self.layer, self.head, self.again = layer, nn.Linear(5, 3), again

    def forward(self, x):
        features = self.layer(x).relu().mean((2, 3))
        kernel = self.layer.kernels[0] if isinstance(self.layer, Listed) else self.layer.weight
        return self.head(features) + (F.linear(features, kernel.sum((2, 3)).T) if self.again else 0)


@guards("layers/tracing.py", "applied.owner[1] if applied.owner else None", "None")
@pytest.mark.parametrize("kind", [Own, Listed])
def test_a_kernel_that_is_used_again_is_refused(kind):
    x, layer = torch.randn(6, 3, 6, 6).double(), kind(3, 5)
    assert lf.measure_flatness(Reused(layer, False).double(), [(x, Y)]).layers["layer"].exact
    with pytest.raises(lf.LayerSelectionError, match="used again in the forward"):
        lf.measure_flatness(Reused(layer, True).double(), [(x, Y)])


class Experts(nn.Module):
    """Samples of two kinds, which have the same classifier: some batches have none of one kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        features, second = self.conv(x).relu().mean((2, 3)), x[:, 0, 0, 0] > 0
        logits = features.new_empty(len(x), 3)
        logits[~second], logits[second] = self.head(features[~second]), self.head(2 * features[second])
        return logits


@guards("layers/convolution.py", "inputs.flatten(1, -2)", "inputs.reshape(len(inputs), -1, inputs.shape[-1])", ids="3")
@guards("layers/convolution.py", "inputs.unsqueeze(1)", "inputs.reshape(len(inputs), -1, inputs.shape[-1])", ids="2")
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_classifier_called_on_no_samples(dimensions):
    torch.manual_seed(0)
    net = Experts().double()
    if dimensions == 3:
        net.head = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Linear(4, 3), nn.Flatten())
    x = X.clone()
    x[:, 0, 0, 0] = -1
    assert_matches_oracle(net, (x, Y), layer="conv")
