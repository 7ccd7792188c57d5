"""Numbers do not depend on torch's default device: tensors of ours name theirs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional.rank_correlation import bootstrap_interval
from lightning_flatness.testing import assert_matches_oracle


def measured_flatness(**options):
    return lambda net, batch: lf.measure_flatness(net, [batch], **options).relative_flatness


def own_loss(logits, targets):
    return nn.functional.cross_entropy(logits, targets, reduction="none")


MEASUREMENTS = {
    "last": measured_flatness(),
    "all": measured_flatness(layers="all"),
    "residual": measured_flatness(layers="all", residual="hutchinson"),
    "classifier": measured_flatness(layers="classifier"),
    "own loss": measured_flatness(loss=own_loss),
    "weights": measured_flatness(class_weight=[1.0, 2.0, 3.0], label_smoothing=0.1, ignore_index=0),
    "lambda_max": lambda net, batch: lf.measure_lambda_max(net, [batch])["0"].lambda_max,
    "spectrum": lambda net, batch: lf.hessian_spectrum(net, [batch], num_steps=4, num_probes=2, top_k=1).trace,
    "landscape": lambda net, batch: float(lf.loss_landscape(net, [batch], steps=3).losses.sum()),
    "comparison": lambda net, batch: lf.compare([net, net], [batch]).covariances["loss"],
    "comparison of reports": lambda net, batch: lf.compare([lf.measure_flatness(net, [batch])] * 2).covariances["loss"],
    "interval of a rank correlation": lambda net, batch: bootstrap_interval(batch[0][:, 0, 0, 0], batch[0][:, 0, 0, 1]),
    "hessian axes": lambda net, batch: float(lf.loss_landscape(net, [batch], axes="hessian", steps=3).losses.sum()),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_default_device_does_not_matter(name):
    """On the device ``meta`` a tensor has no numbers, so one that does not name its device shows."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    net, batch = net.double().eval(), (torch.randn(8, 1, 6, 6).double(), torch.arange(8) % 3)
    expected = MEASUREMENTS[name](net, batch)
    with torch.device("meta"):
        actual = MEASUREMENTS[name](net, batch)
    assert_close(actual, expected, rtol=1e-12, atol=0)


def test_the_default_device_does_not_matter_to_the_oracle():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    with torch.device("meta"):
        assert_matches_oracle(net, batch, "0")


def test_many_classes_are_sampled_whatever_the_default_device():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 150)).double()
    batch = torch.randn(8, 1, 6, 6).double(), torch.arange(8)
    expected = lf.measure_flatness(net, [batch], layers="all").hessian_trace
    with torch.device("meta"):
        assert_close(lf.measure_flatness(net, [batch], layers="all").hessian_trace, expected, rtol=1e-12, atol=0)
