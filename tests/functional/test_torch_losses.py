"""Loss modules of torch with their mean are the same loss, with all their options."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle
from tests.guarding import guards

X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0))
CHANCE = torch.Generator().manual_seed(1)
HOT, NUMBERS = torch.rand(6, 4, generator=CHANCE).round().double(), torch.randn(6, 4, generator=CHANCE).double()
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])
LOSSES = {
    "weights of positives": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), HOT),
    "weights": (nn.BCEWithLogitsLoss(weight=WEIGHT), HOT),
    "whole numbers": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), HOT.long()),
    "Huber": (nn.HuberLoss(delta=0.3), NUMBERS),
    "smooth": (nn.SmoothL1Loss(beta=0.5), NUMBERS),
    "Poisson": (nn.PoissonNLLLoss(), NUMBERS.abs()),
    "several labels": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), HOT),
}


def net(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, classes),
    )  # fmt: skip


@guards("functional/torch_losses.py", "losses.flatten(1).mean(1) if losses.ndim > 1 else ", "", ids="Huber-2")
@pytest.mark.parametrize("layer", ["0", "2", "6"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_matches_the_autograd_hessian(name, layer):
    loss, targets = LOSSES[name]
    of_torch = (lambda f, y: loss.double()(f, y.double())) if name == "whole numbers" else loss
    assert_matches_oracle(net(), (X, targets), layer, loss_function=of_torch, loss=loss)


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0])])
def test_one_logit(weight):
    loss, targets = nn.BCEWithLogitsLoss(pos_weight=weight), HOT[:, 0]
    found = lf.measure_flatness(net(1), [(X, targets)], loss=loss)
    expected = lf.measure_flatness(net(1), [(X, targets[:, None])], loss=loss)
    assert found.hessian_trace == expected.hessian_trace
    assert found.loss == pytest.approx(float(loss(net(1)(X)[:, 0], targets)), rel=1e-6)


def test_the_loss_is_named_and_stays_as_it_is():
    loss = nn.HuberLoss()
    report = lf.measure_flatness(net(), [(X, NUMBERS)], loss=loss)
    assert report.loss_name.startswith("HuberLoss")
    assert loss.reduction == "mean"
    assert report.loss_name != lf.measure_flatness(net(), [(X, NUMBERS)], loss=nn.HuberLoss(delta=2.0)).loss_name


def test_a_loss_of_probabilities():
    model, loss = nn.Sequential(*net(), nn.Sigmoid()), nn.BCELoss()
    found = lf.measure_flatness(model, [(X, HOT)], loss=loss)
    own = lf.measure_flatness(
        model, [(X, HOT)], loss=lambda f, y: F.binary_cross_entropy(f, y, reduction="none").mean(1)
    )
    assert found.hessian_trace == own.hessian_trace
    assert found.loss == pytest.approx(float(loss(model(X), HOT.float())), rel=1e-6)


def test_other_reductions_and_losses_without_a_second_derivative_are_refused():
    with pytest.raises(lf.FlatnessError, match="HuberLoss"):
        lf.measure_flatness(net(), [(X, NUMBERS)], loss=nn.HuberLoss(reduction="sum"))
    with pytest.raises(lf.FlatnessError, match="MultiMarginLoss"):
        lf.measure_flatness(net(), [(X, torch.arange(6) % 4)], loss=nn.MultiMarginLoss())
