"""What a comparison warns of: each caution where it must be, and only there."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import lightning_flatness as lf
from lightning_flatness.measure.network_cautions import network_cautions
from lightning_flatness.results import CAUTIONS
from tests.guarding import guards


def network(seed=0, *, filters=4, norm=True, depth=1, classes=3):
    torch.manual_seed(seed)
    hidden = [part for _ in range(depth - 1) for part in (nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())]
    middle = [nn.BatchNorm2d(filters)] if norm else []
    tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes)
    return with_statistics(nn.Sequential(*hidden, nn.Conv2d(1, filters, 3), *middle, *tail))


def with_statistics(net):
    for module in net.modules():
        module.momentum = None  # the statistics are averages over all batches
    for seed in range(4):
        net(torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


BATCH = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def kinds(models, *args, **options):
    return [caution.kind for caution in lf.compare(models, *args, **options).cautions]


def reports(number=2, **changes):
    """Reports of one network, the last of them changed."""
    found = measured()
    return [*[found] * (number - 1), replace(found, **changes)]


@cache
def measured():
    return lf.measure_flatness(network(), [BATCH])


def test_two_networks_alike_have_no_cautions():
    assert kinds([network(), network()], [BATCH], data="train") == []


def test_training_losses():
    found = reports(loss=0.5)
    assert kinds(found) == ["train_loss_unknown"]
    assert kinds(found, train_losses=[1.0, 0.91]) == []
    assert kinds(found, train_losses=[1.0, 0.89]) == ["train_loss"]
    (caution,) = lf.compare(found, train_losses=[1.0, float("nan")]).cautions
    assert (caution.kind, caution.models) == ("train_loss_unknown", ("2",))
    assert "is not known for 2" in caution.sentence


def test_other_layers_widths_and_depths():
    nets = [network(), network(filters=5, depth=2)]
    cautions = lf.compare(nets, [BATCH], data="train", train_losses=[1, 1]).cautions
    assert [caution.kind for caution in cautions] == ["layers", "width", "depth"]
    assert "(1: 4 x 9, 2: 5 x 9)" in cautions[1].sentence
    assert "(1 2, 2 3)" in cautions[2].sentence
    found = lf.compare(nets, [BATCH], layers="all", data="train", train_losses=[1, 1])
    assert "(1: 4 x 9, 2: 1 x 9)" in found.cautions[1].sentence


def test_other_numbers_of_classes():
    found = lf.compare({"a": network(), "b": network(classes=5)}, [BATCH], train_losses=[1, 1])
    assert [caution.kind for caution in found.cautions] == ["classes"]
    assert "different numbers of classes (a: 3, b: 5)" in found.cautions[0].sentence
    assert found.verdict.endswith("different numbers of classes.")
    first, second = reports()
    layer = second.layers["0"]
    old = replace(layer, info=replace(layer.info, num_classes=0))  # of a file that does not say it
    assert kinds([first, replace(second, layers={"0": old})], train_losses=[1, 1]) == []


def test_labels():
    first, second = reports()
    layer = second.layers["0"]
    inexact = replace(layer, info=replace(layer.info, exact=False, method="gauss_newton", reason="it is curved"))
    alike = {"train_losses": [1, 1]}
    found = lf.compare([first, replace(second, layers={"0": inexact})], **alike)
    assert [caution.kind for caution in found.cautions] == ["not_exact", "method"]
    assert found.cautions[0].models == ("2",)
    assert "it is curved" in found.cautions[0].sentence
    half = replace(layer, info=replace(layer.info, precision="bfloat16"))
    assert kinds([first, replace(second, layers={"0": half})], **alike) == ["precision"]
    assert kinds([first, replace(second, loss_name="mse", data="val")], **alike) == ["loss_function", "data"]
    fewer = replace(layer, num_samples=7)
    assert kinds([first, replace(second, layers={"0": fewer})], **alike) == ["num_samples", "few_samples"]
    other = replace(layer, normalized_relative_flatness=float("nan"))
    assert kinds([first, replace(second, layers={"0": other})], **alike) == ["not_normalised"]


def test_an_exact_number_may_be_of_any_method():
    first, second = reports()
    layer = second.layers["0"]
    other = replace(layer, info=replace(layer.info, method="gauss_newton"))
    assert kinds([first, replace(second, layers={"0": other})], train_losses=[1, 1]) == []


@guards("measure/network_cautions.py", "if fresh:", "if False:")
def test_statistics_of_batch_norm():
    net, alike = network(), {"train_losses": [1, 1]}
    fresh = network()
    fresh[1].reset_running_stats()
    found = lf.compare({"net": net, "averaged": fresh}, [BATCH], **alike)
    assert {caution.kind for caution in found.cautions} == {"batch_norm"}
    assert "never updated in averaged" in found.cautions[0].sentence
    assert "same weights" in found.cautions[1].sentence
    said = "never updated in averaged, net and averaged differ in statistics of BatchNorm alone."
    assert found.verdict.endswith(said)
    plain = network(norm=False)
    (caution,) = lf.compare({"net": net, "plain": plain}, [BATCH], **alike).cautions
    assert "plain without" in caution.sentence
    assert caution.short == "only some networks have BatchNorm"
    moved = network()
    moved[1].running_mean += 0.1
    (caution,) = lf.compare({"net": net, "moved": moved}, [BATCH], **alike).cautions
    assert "net and moved have the same weights" in caution.sentence


def test_statistics_of_nan_are_no_difference():
    nets = [network(), network()]
    for net in nets:
        net[1].running_var[0] = float("nan")
    apart = {"1": 0.0, "2": 0.0}
    assert network_cautions({}, dict(zip("12", nets, strict=True)), apart) == []


def deep(seed):
    torch.manual_seed(seed)
    blocks = [
        part for inputs in (1, 8, 8) for part in (nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return with_statistics(net)


@guards("measure/network_cautions.py", "if not misfits:", "if True:")
def test_statistics_that_do_not_fit_the_data_after_averaging_weights():
    one, other, third = deep(0), deep(1), deep(2)
    averaged = deepcopy(one)
    with torch.no_grad():
        for parameter, its in zip(averaged.parameters(), third.parameters(), strict=True):
            parameter.lerp_(its, 0.5)
    alike = {"train_losses": [1, 1, 1]}
    (caution,) = lf.compare({"one": one, "averaged": averaged, "other": other}, [BATCH], **alike).cautions
    assert (caution.kind, caution.models) == ("batch_norm", ("averaged",))
    assert "do not fit the data in averaged" in caution.sentence
    assert "So this network does not compute what it computed in training." in caution.sentence
    assert caution.short == "statistics of BatchNorm do not fit the data in averaged"
    swa_utils.update_bn([BATCH[0]], averaged)
    assert kinds({"one": one, "averaged": averaged, "other": other}, [BATCH], **alike) == []
    # A batch that is unlike all statistics is not their fault.
    shifted = BATCH[0] + 3, BATCH[1]
    assert kinds([one, other, third], [shifted], **alike) == []
    assert not any(module._forward_pre_hooks for module in averaged.modules())


def test_reports_know_what_their_networks_are_made_of():
    nets = [network(), network(depth=3), network(norm=False)]
    nets[1][5].reset_running_stats()
    found = [lf.measure_flatness(net, [BATCH]) for net in nets]
    assert [report.depth for report in found] == [2, 4, 2]
    assert [report.batch_norms for report in found] == [1, 1, 0]
    assert [report.fresh_batch_norms for report in found] == [0, 1, 0]
    cautions = lf.compare(found, train_losses=[1, 1, 1]).cautions
    assert [caution.kind for caution in cautions] == ["layers", "depth", "batch_norm", "batch_norm"]
    assert "3 without" in cautions[2].sentence
    assert "updated in 2" in cautions[3].sentence
    unknown = [replace(report, depth=0, batch_norms=0, fresh_batch_norms=0) for report in found]
    assert kinds(unknown, train_losses=[1, 1, 1]) == ["layers"]


@pytest.mark.parametrize(("number", "expected"), [(4, ["few_models"]), (5, [])])
def test_few_models(number, expected):
    found = reports(number)
    alike = {"train_losses": [1.0] * number, "outcome": list(range(number))}
    assert kinds(found, **alike) == expected
    intervals = [one.interval for one in lf.compare(found, **alike).correlations]
    assert not any(intervals)  # the reports are all the same


def test_every_caution_is_known_and_is_said_everywhere():
    found = lf.compare(reports(loss_name="mse"))
    assert [caution.kind for caution in found.cautions] == ["train_loss_unknown", "loss_function"]
    assert {caution.kind for caution in found.cautions} <= set(CAUTIONS)
    for caution in found.cautions:
        assert caution.to_dict() in found.to_dict()["cautions"]
        assert caution.sentence in found._repr_html_()
        assert f"CAUTION: {caution.sentence}" in str(found.table().caption)
        assert caution.kind in repr(found)
