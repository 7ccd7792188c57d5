"""What a measurement keeps of single samples."""

import math

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.measure.samples import Held, SampleValues, deviations_of
from tests.device_waits import Looks
from tests.guarding import guards


@guards("measure/samples.py", "torch.where(counts, sums[name]", "torch.where(counts | ~counts, sums[name]")
def test_ignored_samples_are_left_out_without_waiting_for_a_device():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).double()
    x, y = torch.randn(12, 1, 6, 6).double(), torch.arange(12) % 4
    y[::2] = -100
    sums, values = FlatnessObserver(net).sums(x, y), SampleValues()
    with Looks() as looks:
        values.add(sums, torch.arange(12), {"0"})
    assert looks.found == []
    alone = lf.measure_flatness(net, [(x[1::2], y[1::2])])
    assert not math.isnan(alone.layers["0"].largest_tenth)
    assert values.gathered(False).largest_tenth("0") == pytest.approx(alone.layers["0"].largest_tenth, rel=1e-10)


def test_samples_of_a_class_without_weight_have_no_values():
    """With label smoothing, they add to the mean loss all the same."""
    net, x, y = nn.Linear(3, 4).double(), torch.randn(8, 3).double(), torch.arange(8) % 4
    options = {"layers": "classifier", "class_weight": [0.0, 1.0, 2.0, 1.0], "per_sample": True}
    found = lf.measure_flatness(net, [(x, y)], label_smoothing=0.1, **options)
    layer = found.layers[""]
    for values in (*layer.samples.values(), found.samples["loss"], found.samples["curvature"]):
        assert values.isnan().tolist() == (y == 0).tolist()
        assert values[y > 0].isfinite().all()
    plain = lf.measure_flatness(net, [(x, y)], **options)
    weighted = (plain.samples["loss"] * plain.samples["weight"])[y > 0].sum() / plain.samples["weight"].sum()
    assert plain.loss == pytest.approx(float(weighted))


@guards("measure/samples.py", "< FIRST_SAMPLES", "< FIRST_SAMPLES + 1")
def test_the_spread_is_that_of_the_first_samples_whatever_is_held():
    """An observed batch shows all its samples, in the order of the measured set or not."""
    inputs, order = torch.randn(200, 3, 5).double(), torch.randperm(200)
    held = [Held({"conv": ChannelSums.of(inputs[some])}, some, measure=dict) for some in (order[:90], order[90:])]
    expected = inputs[:128].transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(deviations_of(held, sync=False)["conv"], expected, rtol=1e-12, atol=0)


@guards("layers/waiting.py", "if certified.need_backward:", "if True:", ids="last")
@guards("layers/waiting.py", "if certified.need_backward:", "if False:", ids="first")
@pytest.mark.parametrize(
    ("layers", "sizes", "expected"),
    [
        # One pass finds the layers, one is certified and one shows that weights act through the layers alone.
        ("last", [64], [64, 64, 64]),
        ("last", [64, 64, 64], [64, 64, 64, 64, 64]),
        ("last", [1000], [128, 128, 128, 872]),
        ("classifier", [64, 64], [64, 64, 64, 64]),
        # Gauss-Newton needs the graph, so the first samples run again when the spread of the channels is known.
        ("0", [64, 64], [64, 64, 64, 64, 64, 64]),
        ("0", [1000], [128, 128, 128, 1000]),
    ],
    ids=["last", "last-batches", "last-large", "classifier", "first", "first-large"],
)
def test_samples_run_once_besides_the_passes_that_certify_the_first(layers, sizes, expected):
    rows = []

    class Net(nn.Sequential):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()
    net = Net(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).double()
    x, y = torch.randn(sum(sizes), 1, 4, 4).double(), torch.arange(sum(sizes)) % 4
    found = lf.measure_flatness(net, list(zip(x.split(sizes), y.split(sizes), strict=True)), layers=layers)
    assert rows == expected
    whole = lf.measure_flatness(net, [(x[:64], y[:64])] if sizes == [64] else (x, y), layers=layers)
    for one, other in zip(found.layers.values(), whole.layers.values(), strict=True):
        torch.testing.assert_close(one.block_traces, other.block_traces, rtol=1e-12, atol=1e-15)
        assert one.normalized_relative_flatness == pytest.approx(other.normalized_relative_flatness, rel=1e-12)
