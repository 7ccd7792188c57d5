"""All layers of a ResNet-20 against BackPACK's exact diagonal of the Gauss-Newton matrix."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from benchmarks.networks import resnet20
from tests.networks import randomise_statistics

backpack = pytest.importorskip("backpack")
extensions = pytest.importorskip("backpack.extensions")


def diagonal_traces(net, x, y):
    """Sums of the Gauss-Newton diagonal over the weights of every filter, by layer."""
    extended = backpack.extend(deepcopy(net), use_converter=True).eval()
    names = [name for name, _ in net.named_parameters()]
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact()):
        loss(extended(x.clone().requires_grad_()), y).backward()
    weights = zip(names, extended.parameters(), strict=True)
    return {
        name.removesuffix(".weight"): weight.diag_ggn_exact.flatten(1).sum(1)
        for name, weight in weights
        if weight.ndim > 1
    }


def test_filter_traces_are_those_of_backpack():
    net = randomise_statistics(resnet20())
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    report = lf.measure_flatness(net, [(x, y)], layers="all")
    expected = diagonal_traces(net, x, y)
    assert report.layers.keys() == expected.keys()
    assert len(expected) == 22
    for name, traces in expected.items():
        actual = report.layers[name].filter_traces.to(traces)
        atol = 1e-5 * float(traces.max())
        assert_close(actual, traces, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
