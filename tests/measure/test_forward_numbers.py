"""Numbers of forward passes beside those of plain PyTorch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_flatness.errors import BatchError
from lightning_flatness.measure.forward_numbers import forward_numbers
from lightning_flatness.model.options import MeasuringOptions
from tests.guarding import guards


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def images(number, seed):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(number, 1, 6, 6, generator=drawn), torch.randint(3, (number,), generator=drawn)


def test_means_over_batches_of_different_sizes():
    net, batches = network(), [images(7, 0), images(3, 1), images(0, 2)]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    net.eval()
    with torch.no_grad():
        features = net[:-1](inputs)
        logits = net[-1](features)
    net.train()
    found = forward_numbers(net, batches, MeasuringOptions())
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, targets)), rel=1e-6)
    others = logits.masked_fill(functional.one_hot(targets, 3).bool(), -math.inf).amax(1)
    margin = (logits.gather(1, targets[:, None])[:, 0] - others).mean()
    assert found.margin == pytest.approx(float(margin), rel=1e-5)
    spread = net[-1].weight.detach().var(0, unbiased=False).sum()
    assert found.feature_spread == pytest.approx(float(features.square().sum(1).mean() * spread), rel=1e-5)
    assert net.training
    assert int(net[1].num_batches_tracked) == 0


def test_ignored_samples_and_class_weights():
    net = network().eval()
    inputs, targets = images(12, 0)
    weight = torch.tensor([1.0, 2.0, 3.0])
    targets[::3] = -100
    found = forward_numbers(net, [(inputs, targets)], MeasuringOptions(class_weight=weight))
    kept = targets >= 0
    expected = functional.cross_entropy(net(inputs), targets, weight=weight)
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    alone = forward_numbers(net, [(inputs[kept], targets[kept])], MeasuringOptions())
    assert (found.margin, found.feature_spread) == pytest.approx((alone.margin, alone.feature_spread), rel=1e-6)


def test_what_there_is_not_is_not_known():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inputs, targets = images(5, 0)
    found = forward_numbers(net, [(inputs, torch.rand(5, 3))], MeasuringOptions(loss="mse"))
    assert math.isfinite(found.loss)
    assert math.isnan(found.margin)
    assert math.isnan(found.feature_spread)
    with pytest.raises(BatchError, match="no targets"):
        forward_numbers(net, [inputs], MeasuringOptions())
    with pytest.raises(BatchError, match="No sample was measured, so there is no loss"):
        forward_numbers(net, [(inputs, torch.full_like(targets, -100))], MeasuringOptions())


def test_targets_of_a_small_integer_type():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 300))
    inputs, targets = images(3, 0)[0], torch.tensor([156, 1, 255])
    expected = forward_numbers(net, [(inputs, targets)], MeasuringOptions())
    assert forward_numbers(net, [(inputs, targets.to(torch.uint8))], MeasuringOptions()) == expected


class MadeAnew(nn.Module):
    """A linear layer that is made anew whenever the module goes to evaluation mode."""

    def __init__(self, *sizes):
        super().__init__()
        self.linear = nn.Linear(*sizes)

    def train(self, mode=True):
        if not mode and "whole" not in self._modules:
            self.whole = nn.Linear(self.linear.in_features, self.linear.out_features)
            self.whole.load_state_dict(self.linear.state_dict())
        elif mode:
            self._modules.pop("whole", None)
        return super().train(mode)

    def forward(self, x):
        return (self.linear if self.training else self.whole)(x)


@guards("measure/forward_numbers.py", "with kept_switched(model), ", "with ")
def test_a_classifier_that_is_made_anew_in_evaluation_mode():
    batches = [images(7, 0), images(3, 1)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), MadeAnew(36, 3))
    validated = forward_numbers(net.eval(), batches, MeasuringOptions())
    assert forward_numbers(net.train(), batches, MeasuringOptions()) == validated
    assert validated.feature_spread > 0


def test_a_classifier_that_takes_its_input_by_keyword():
    class Keyword(nn.Sequential):
        def forward(self, x):
            return self[-1](input=nn.Sequential(*list(self)[:-1])(x))

    net = network().eval()
    expected = forward_numbers(net, [images(7, 0)], MeasuringOptions()).feature_spread
    assert forward_numbers(Keyword(*net), [images(7, 0)], MeasuringOptions()).feature_spread == expected
