import torch
from torch import nn
from torch.nn.utils import parametrizations

import lightning_flatness as lf
from lightning_flatness.measure.flatness import Measurement
from lightning_flatness.results import as_text, summary_table


def net(act):
    conv = parametrizations.weight_norm(nn.Conv2d(2, 4, 3, groups=2))
    return nn.Sequential(nn.Conv2d(1, 2, 1), act, conv, act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batch():
    return torch.randn(5, 1, 6, 6), torch.randint(3, (5,))


def test_report_prints_a_row_for_every_layer_within_80_columns():
    report = lf.measure_flatness(net(nn.SiLU()), [batch()], layers="all")
    text = as_text(report.table(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "Flatness over 5 samples" in text
    assert "since the network is curved after it" in " ".join(
        text.split()
    )  # the first convolution is not exact, and says why
    assert [line.split("│")[-2].strip() for line in text.splitlines() if line.startswith("│")] == ["no", "yes", "yes"]
    assert report.num_samples == 5
    assert report.hessian_trace == sum(layer.hessian_trace for layer in report.layers.values())


def test_summary_says_how_every_layer_is_measured():
    measurement = Measurement(net(nn.ReLU()), layers="all")
    measurement.update(*batch())
    text = as_text(summary_table(measurement.layers, verbose=True), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 x 9, 2 groups" in text
    assert "2*" in text  # measured with respect to the kernel that weight_norm yields
    assert "closed form" in text
    assert "Gauss-Newton" in text
    assert " 6 " in text, "names are not folded"


def test_summary_leaves_details_to_its_verbose_form():
    measurement = Measurement(net(nn.ReLU()), layers="all")
    measurement.update(*batch())
    text = as_text(summary_table(measurement.layers), width=80)
    assert "Flatness is measured for these layers." in text
    assert max(map(len, text.splitlines())) <= 80
    assert not any(detail in text for detail in ("x 9", "mult.", "deviation"))
