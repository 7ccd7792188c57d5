"""Functions as losses: what shows that a function is random, or mixes samples."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import CustomLoss
from tests.guarding import guards

LABELS = torch.tensor([0, 1, 2, 3, 0, 0, 2])


def of_samples(f, y, **options):
    return F.cross_entropy(f, y, reduction="none", **options)


class Dropped(nn.Module):
    def forward(self, f, y):
        return of_samples(F.dropout(f, training=self.training), y)


RANDOM = {
    "module": Dropped(),
    "noise": lambda f, y: of_samples(f + 1e-3 * torch.randn_like(f), y),
    "factor": lambda f, y: random.random() * of_samples(f, y),
}


@guards("functional/loss_argument.py", "if self._differ(self._called(f, targets), losses, f):", "if False:")
@pytest.mark.parametrize("loss", RANDOM)
def test_random_losses_are_refused(loss):
    with pytest.raises(FlatnessError, match=r"is random.*loss.eval\(\)"):
        CustomLoss(RANDOM[loss])(torch.randn(1, 4), LABELS[:1])


OF_BATCH = {
    "size": lambda f, y: of_samples(f, y) / len(f),
    "mean weight": lambda f, y: of_samples(f, y) / (1.0 + y).mean(),
    "frequencies": lambda f, y: of_samples(f, y, weight=1 / torch.bincount(y, minlength=4).to(f).clamp_min(1)),
    "detached": lambda f, y: of_samples(f, y) * f.detach().std(),
}


@guards("functional/loss_argument.py", "if self._differ(in_parts, losses[torch.cat(parts)], f):", "if False:")
@pytest.mark.parametrize("loss", OF_BATCH)
def test_losses_that_depend_on_the_rest_of_the_batch_are_refused(loss):
    with pytest.raises(BatchError, match="depends on other samples .*number of samples.* class_weight="):
        CustomLoss(OF_BATCH[loss])(torch.randn(7, 4), LABELS)


def masked(f, y):
    losses = torch.zeros(len(f), dtype=f.dtype)
    return losses.masked_scatter(y > 0, of_samples(f[y > 0], y[y > 0]) / 3)


SEPARATE = {
    "mask": masked,
    "ignored": lambda f, y: of_samples(f, y, ignore_index=0),
    "weights of these samples": lambda f, y: torch.arange(7.0) * of_samples(f, y),
    "head in float32": lambda f, y: of_samples(f.float() @ torch.linspace(-9, 9, 16).reshape(4, 4), y).double(),
    "infinite": lambda f, y: torch.where(y > 0, of_samples(f, y), torch.inf),
}


@pytest.mark.parametrize("loss", SEPARATE)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_of_separate_samples_are_taken(loss, scale):
    logits = scale * torch.randn(7, 4)
    assert CustomLoss(SEPARATE[loss])(logits, LABELS).residual.shape == (7, 4)
    assert CustomLoss(SEPARATE["ignored"])(logits[:0], LABELS[:0]).num_samples == 0
