"""Comparison of models: the numbers are those of measure_flatness, errors are those of the same samples."""

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.rank_correlation import MEASURES

NUMBERS = ("loss", "accuracy", *MEASURES)


def network(seed=0, hidden=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def samples(number=320, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 4, generator=drawn)
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()


def measured(net, batch=None, **options):
    return lf.measure_flatness(net, [samples() if batch is None else batch], layers="0", **options)


def test_numbers_are_those_of_the_reports():
    nets = {"a": network(0), "b": network(1)}
    reports = {name: measured(net) for name, net in nets.items()}
    for found in (
        lf.compare(reports),
        lf.compare(nets, [samples()], layers="0"),
        lf.compare(list(nets.values()), [samples()], layers="0"),
    ):
        for row, report in zip(found.models.values(), reports.values(), strict=True):
            for number in (*NUMBERS, "weight_norm"):
                assert getattr(row, number) == getattr(report, number)
            assert row.errors["loss"] == pytest.approx(report.sampling_errors["loss"], rel=1e-12)
            for number in ("hessian_trace", "relative_flatness", "normalized_relative_flatness"):
                assert row.errors[number] == pytest.approx(report.sampling_errors[number], rel=1e-12)


def test_the_error_of_a_difference_is_that_of_the_same_samples():
    """The jackknife of the difference itself, of values of single samples."""
    first, second = (measured(network(seed), per_sample=True) for seed in (0, 1))
    found = lf.compare([first, second])
    assert found.is_paired
    for number in ("loss", "relative_flatness", "normalized_relative_flatness", "hessian_trace"):
        values = [r.samples["loss"] if number == "loss" else r.layers["0"].samples[number] for r in (first, second)]
        difference = values[1] - values[0]
        groups = torch.stack([difference[group::32].sum() for group in range(32)])
        without = (difference.sum() - groups) / (len(difference) - 10)
        error = (31 / 32 * (without - without.mean()).square().sum()).sqrt()
        assert found.difference(number, "2").error == pytest.approx(float(error), rel=1e-9)


def test_a_model_beside_itself_differs_by_nothing_and_surely_so():
    net = network()
    found = lf.compare({"a": net, "same": net}, [samples()], layers="0").difference("relative_flatness", "same")
    assert (found.value, found.error, found.ratio) == (0, pytest.approx(0, abs=1e-9), 1)
    assert not found.is_clear


def test_samples_in_another_order_are_not_paired():
    inputs, targets = samples()
    nets = network(0), network(1)
    for net in nets:
        for _ in range(30):
            loss = nn.functional.cross_entropy(net(inputs), targets)
            net.zero_grad()
            loss.backward()
            for parameter in net.parameters():
                parameter.data -= 0.5 * parameter.grad
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    reports = measured(nets[0], per_sample=True), measured(nets[1], (inputs[order], targets[order]), per_sample=True)
    found = lf.compare(reports)
    assert not found.is_paired
    expected = sum(report.sampling_errors["loss"] ** 2 for report in reports) ** 0.5
    assert found.difference("loss", "2").error == pytest.approx(expected, rel=1e-9)


def test_refusals():
    with pytest.raises(FlatnessError, match="two or more"):
        lf.compare([measured(network())])
    with pytest.raises(FlatnessError, match="give batches="):
        lf.compare([network(), network()])
    with pytest.raises(FlatnessError, match="'2' is a str"):
        lf.compare([network(), "path.ckpt"], [samples()])
    found = lf.compare([measured(network(seed)) for seed in (0, 1)])
    with pytest.raises(FlatnessError, match="no model 'x'"):
        found.difference("loss", "x")
    with pytest.raises(FlatnessError, match="number='weight_norm'"):
        found.difference("weight_norm", "2")
