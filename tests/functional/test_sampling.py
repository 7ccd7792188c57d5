"""Standard errors over samples, against means of data sets drawn anew."""

import math

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.functional.sampling import GROUPS, grouped, interval, largest_tenth, sampling_errors
from tests.guarding import guards


def population(number=3000):
    """Trace, relative flatness and loss of single samples of a network that is sure of some of them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    net = nn.Sequential(*layers).double()
    x, y = torch.randn(number, 1, 5, 5).double() * torch.rand(number, 1, 1, 1).double(), torch.randint(4, (number,))
    with torch.no_grad():
        net[4].weight.mul_(20)
    report = lf.measure_flatness(net, [(x, y)], per_sample=True)
    (layer,) = report.layers.values()
    columns = [layer.samples["hessian_trace"], layer.samples["relative_flatness"], report.samples["loss"]]
    return torch.stack(columns, dim=1)


def test_intervals_cover_the_mean_of_the_population():
    values, generator = population(), torch.Generator().manual_seed(1)
    assert largest_tenth(values[:, 1]) > 0.2
    covered = torch.zeros(3)
    for _ in range(200):
        drawn = values[torch.randint(len(values), (400,), generator=generator)]
        sums = grouped(drawn, torch.arange(400))
        errors = sampling_errors(sums, grouped(torch.ones(400, 1), torch.arange(400))[:, 0])
        for index in range(3):
            low, high = interval(float(drawn[:, index].mean()), float(errors[index]), GROUPS)
            covered[index] += low <= float(values[:, index].mean()) <= high
    assert (covered >= 180).all(), covered
    assert (covered <= 197).all(), covered


@guards("functional/sampling.py", "(number - 1) / number * ", "")
def test_errors_are_those_of_a_mean_of_groups():
    values = torch.randn(320, 2, generator=torch.Generator().manual_seed(2)).double()
    sums = grouped(values, torch.arange(320))
    means = sums / 10
    errors = sampling_errors(sums, torch.full((GROUPS,), 10.0))
    torch.testing.assert_close(errors, means.std(0) / math.sqrt(GROUPS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_few_samples_are_groups_of_their_own(number):
    values = torch.randn(number, 1, generator=torch.Generator().manual_seed(3)).double()
    errors = sampling_errors(
        grouped(values, torch.arange(number)), grouped(torch.ones(number, 1), torch.arange(number))[:, 0]
    )
    if number < 2:
        assert errors.isnan().all()
    else:
        torch.testing.assert_close(errors, values.std(0) / math.sqrt(number), rtol=1e-10, atol=0)


def test_the_largest_tenth():
    assert largest_tenth(torch.arange(1, 11)) == pytest.approx(10 / 55)
    assert math.isnan(largest_tenth(torch.zeros(4)))
    assert math.isnan(largest_tenth(torch.zeros(0)))


def test_a_report_says_what_single_samples_say():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).double()
    x, y = torch.randn(70, 1, 5, 5).double(), torch.randint(4, (70,))
    report = lf.measure_flatness(net, [(x[:30], y[:30]), (x[30:], y[30:])], per_sample=True, layers=["0", "4"])
    losses = nn.functional.cross_entropy(net(x), y, reduction="none").detach()
    torch.testing.assert_close(report.samples["loss"], losses)
    assert report.samples["prediction"].equal(net(x).argmax(1))
    assert report.loss == pytest.approx(float(losses.mean()))
    assert report.accuracy == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
    pi = net(x).softmax(1)
    assert report.curvature == pytest.approx(float((1 - pi.square().sum(1)).mean()))
    for name in ("hessian_trace", "relative_flatness", "normalized_relative_flatness"):
        for layer in report.layers.values():
            assert float(layer.samples[name].mean()) == pytest.approx(getattr(layer, name), rel=1e-10)
    one = lf.measure_flatness(net, [(x[:1], y[:1])], measures=("hessian_trace", "relative_flatness")).layers["0"]
    assert one.relative_flatness == pytest.approx(float(report.layers["0"].samples["relative_flatness"][0]), rel=1e-10)
    assert math.isnan(one.sampling_errors["relative_flatness"])


def test_ignored_samples_and_class_weights():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).double()
    x, y = torch.randn(60, 1, 5, 5).double(), torch.arange(60) % 3
    y[::2] = -1
    kept, options = y >= 0, {"class_weight": [1.0, 0.0, 3.0]}
    report = lf.measure_flatness(net, [(x, y)], ignore_index=-1, per_sample=True, **options)
    alone = lf.measure_flatness(net, [(x[kept], y[kept])], per_sample=True, **options)
    (layer,), (expected,) = report.layers.values(), alone.layers.values()
    weight = report.samples["weight"]
    assert weight[~kept].eq(0).all()
    assert report.accuracy == pytest.approx(alone.accuracy)
    assert layer.largest_tenth == pytest.approx(expected.largest_tenth)
    assert report.num_groups == int(torch.stack([weight[group::32].sum() > 0 for group in range(32)]).sum())
    losses = nn.functional.cross_entropy(net(x), y.clamp_min(0), reduction="none").detach()
    counted = weight > 0
    torch.testing.assert_close(report.samples["loss"][counted], losses[counted])
    for values, mean in (
        (report.samples["loss"], report.loss),
        (layer.samples["relative_flatness"], layer.relative_flatness),
    ):
        assert float((weight * values)[counted].sum() / weight.sum()) == pytest.approx(mean, rel=1e-10)


def test_targets_that_a_loss_ignores_by_itself_have_no_accuracy():
    net, y = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double(), torch.tensor([0, 1, -100, 2])

    def focal(logits, targets):
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    report = lf.measure_flatness(net, [(torch.randn(4, 1, 4).double(), y)], loss=focal, layers="classifier")
    assert math.isnan(report.accuracy)
