"""Comparison of models: the numbers are those of measure_flatness, errors are those of the same samples."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_flatness as lf
from lightning_flatness.errors import FlatnessError, LayerSelectionError
from lightning_flatness.results.rank_correlation import MEASURES
from tests.guarding import guards

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


@guards("functional/sampling.py", "(1 - 1 / number) * deviations", "deviations")
@guards("measure/compared.py", "if is_paired and", "if False and")
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


@guards("measure/compared.py", "if together:\n        return True", "if together:\n        return False")
def test_models_without_classes_are_paired_when_measured_together():
    inputs, _ = samples()
    batch = inputs, inputs[:, :3] ** 2
    nets = {"a": network(0), "b": network(1)}
    options = {"layers": "0", "loss": "mse"}
    assert lf.compare(nets, [batch], **options).is_paired
    reports = {name: lf.measure_flatness(net, [batch], per_sample=True, **options) for name, net in nets.items()}
    assert not lf.compare(reports).is_paired
    assert not lf.compare(nets, [batch], per_sample=False, **options).is_paired


def test_errors_of_estimates_count():
    net = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3))
    reports = [
        lf.measure_flatness(net, [samples(40)], layers="0", residual="hutchinson", num_probes=4, seed=seed)
        for seed in (0, 1)
    ]
    known = [replace(report, sampling_errors={"hessian_trace": 0.0}) for report in reports]
    expected = math.hypot(*(report.standard_errors["hessian_trace"] for report in reports))
    assert lf.compare(known).difference("hessian_trace", "2").error == pytest.approx(expected, rel=1e-9)
    unknown = lf.compare(reports).difference("hessian_trace", "2")
    assert not unknown.is_known
    assert not unknown.is_clear


@pytest.mark.slow
def test_ratios_and_their_errors_are_to_first_order_those_of_redrawn_samples():
    net, other = network(0), network(1)
    found = lf.compare([net, other], [samples(960)], layers="0").difference("relative_flatness_per_loss", "2")
    drawn = torch.tensor(
        [
            [measured(one, samples(960, seed)).relative_flatness_per_loss for one in (net, other)]
            for seed in range(1, 16)
        ]
    )
    ratios = drawn[:, 1] / drawn[:, 0]
    assert found.ratio_error == pytest.approx(float(ratios.std()), rel=0.6)
    assert found.error == pytest.approx(float((drawn[:, 1] - drawn[:, 0]).std()), rel=0.6)


def test_batches_are_read_once_for_all_models():
    reads = []

    def batches():
        for seed in range(3):
            reads.append(seed)
            yield samples(40, seed)

    found = lf.compare([network(0), network(1)], batches(), layers="0")
    assert reads == [0, 1, 2]
    assert found.models["2"].loss == pytest.approx(measured_of_three(network(1)).loss, rel=1e-12)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*samples(40), strict=True)


def test_a_loader_without_a_length_is_read():
    nets, loader = [network(0), network(1)], DataLoader(Stream(), batch_size=16)
    expected = measured(nets[1], samples(40)).loss
    assert lf.compare(nets, loader, layers="0").models["2"].loss == pytest.approx(expected, rel=1e-6)
    assert lf.measure_flatness(nets[1], loader, layers="0").loss == pytest.approx(expected, rel=1e-6)


def measured_of_three(net):
    return lf.measure_flatness(net, [samples(40, seed) for seed in range(3)], layers="0")


def test_reports_and_models_may_be_mixed():
    report = measured(network(0), per_sample=True)
    mixed = lf.compare({"old": report, "new": network(1)}, [samples()], layers="0")
    both = lf.compare({"old": network(0), "new": network(1)}, [samples()], layers="0")
    for number in NUMBERS:
        assert mixed.difference(number, "new").value == both.difference(number, "new").value


def test_training_losses_are_measured_or_given():
    nets, train = {"a": network(0), "b": network(1)}, samples(200, seed=3)
    expected = [nn.functional.cross_entropy(net(train[0]), train[1]).item() for net in nets.values()]
    reports = {name: measured(net) for name, net in nets.items()}
    of_training = {name: measured(net, train) for name, net in nets.items()}
    for found in (
        lf.compare(nets, [samples()], layers="0", train_batches=[train]),
        lf.compare(reports, train_losses=of_training),
        lf.compare(reports, train_losses=expected),
        lf.compare(nets, [train], layers="0", data="train"),
        lf.compare({name: replace(report, data="train") for name, report in of_training.items()}),
        lf.compare(of_training, data="train"),
        lf.compare({"a": of_training["a"], "b": nets["b"]}, [train], layers="0", data="train"),
    ):
        assert [row.train_loss for row in found.models.values()] == pytest.approx(expected, rel=1e-6)
        assert "train_loss_unknown" not in {caution.kind for caution in found.cautions}


@guards("measure/forward_numbers.py", "            handle.remove()", "            pass")
def test_nothing_is_left_on_the_models():
    nets = [network(0), network(1).train()]
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    state = torch.get_rng_state()
    lf.compare(nets, [samples(40)], layers="0", train_batches=[samples(40, 1)], outcome=[1.0, 2.0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [net.training for net in nets] == [True, True]
    for net, states in zip(nets, before, strict=True):
        assert all(torch.equal(tensor, states[name]) for name, tensor in net.state_dict().items())
        assert all(parameter.grad is None for parameter in net.parameters())
        assert not any(module._forward_pre_hooks for module in net.modules())


@guards("measure/compared.py", 'if bool((classes[both] != report.samples["prediction"][both]).any()):', "if False:")
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


def test_numbers_of_numpy_and_tensors_are_numbers():
    reports = [measured(network(seed)) for seed in (0, 1)]
    expected = lf.compare(reports, outcome=[0.5, 2.0], train_losses=[0.5, 2.0])
    for kind in (np.float32, np.array, torch.tensor, Fraction):
        numbers = [kind(0.5), kind(2)]
        assert lf.compare(reports, outcome=numbers, train_losses=numbers).to_dict() == expected.to_dict()


def test_hyperparameters_may_be_lists():
    reports = [measured(network(seed), samples(40)) for seed in range(4)]
    rows = [{"lr": lr, "widths": widths} for widths in ([4], [4, 8]) for lr in (0.1, 0.2)]
    tuples = [{**row, "widths": tuple(row["widths"])} for row in rows]
    found, expected = (
        [one.granulated for one in lf.compare(reports, outcome=[1, 2, 3, 4], hyperparameters=these).correlations]
        for these in (rows, tuples)
    )
    assert found == expected
    assert math.isfinite(found[0])


@pytest.mark.parametrize("numbers", [(40, 20), (320, 64)])
def test_reports_of_other_numbers_of_samples_are_not_of_the_same(numbers):
    reports = [measured(network(), samples(number), per_sample=True) for number in numbers]
    assert not lf.compare(reports).is_paired
    with pytest.raises(
        FlatnessError, match=f"same_samples=True, but the reports have {numbers[0]} / {numbers[1]} samp"
    ):
        lf.compare(reports, same_samples=True)


def test_refusals():
    with pytest.raises(FlatnessError, match="takes two models or more"):
        lf.compare([measured(network())])
    with pytest.raises(FlatnessError, match="Model '1' has no data.*give batches="):
        lf.compare([network(), network()])
    with pytest.raises(FlatnessError, match="layers= is for models"):
        lf.compare([measured(network()), measured(network())], layers="0")
    with pytest.raises(FlatnessError, match="option='layer' is not known; choose one of .*'layers'"):
        lf.compare([network(), network()], [samples()], layer="0")
    with pytest.raises(FlatnessError, match="mapping or a list"):
        lf.compare(network(), [samples()])
    with pytest.raises(FlatnessError, match="one process"):
        lf.compare([network(), network()], [samples()], sync=True)
    with pytest.raises(LayerSelectionError, match="Model 'b': .*matches no"):
        lf.compare({"a": network(), "b": nn.Sequential(nn.Linear(4, 3))}, [samples()], layers="2")
    with pytest.raises(FlatnessError, match="outcome= must have the names of models=, but 'c' is in only one of them"):
        lf.compare({"a": network(), "b": network()}, [samples()], layers="0", outcome={"a": 1.0, "b": 2.0, "c": 1.0})
    with pytest.raises(FlatnessError, match="outcome= has 1 entries for 2 models"):
        lf.compare([network(), network()], [samples()], layers="0", outcome=[1.0])
    with pytest.raises(FlatnessError, match="outcome= of model '2' is 'x'; give a number"):
        lf.compare([network(), network()], [samples()], layers="0", outcome=[1.0, "x"])
    for value in (True, np.array(True), torch.tensor(True), torch.ones(2), 1j):
        with pytest.raises(FlatnessError, match="outcome= of model '2' is .*give a number"):
            lf.compare([measured(network())] * 2, outcome=[1.0, value])
    with pytest.raises(FlatnessError, match="train_losses= of model '1' is 'x'; give a number, or a Flatness"):
        lf.compare([network(), network()], [samples()], layers="0", train_losses=["x", 1.0])
    with pytest.raises(FlatnessError, match="hyperparameters= of model '2' has no 'lr'"):
        lf.compare([network(), network()], [samples()], layers="0", outcome=[1, 2], hyperparameters=[{"lr": 1}, {}])
    for word in ("batches", "train_batches"):
        data = {"batches": [samples()], word: iter([samples()])}
        with pytest.raises(FlatnessError, match=f"^{word} is a list_iterator"):
            lf.compare([network(), network()], layers="0", outcome=[1.0, 2.0], **data)
    with pytest.raises(FlatnessError, match="'2' is a str"):
        lf.compare([network(), "path.ckpt"], [samples()])
    found = lf.compare([measured(network(seed)) for seed in (0, 1)])
    with pytest.raises(FlatnessError, match="no model 'x'"):
        found.difference("loss", "x")
    with pytest.raises(FlatnessError, match="number='weight_norm'"):
        found.difference("weight_norm", "2")
