"""Functions as losses: what shows that a function is random, or mixes samples, and how often that is looked at."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import CrossEntropy, CustomLoss, find_loss
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


@guards(
    "functional/loss_calls.py", "again = _differ(call(logits, targets), losses, logits)", "again = torch.tensor(False)"
)
@pytest.mark.parametrize("loss", RANDOM)
def test_random_losses_are_refused(loss):
    with pytest.raises(FlatnessError, match=r"is random.*loss.eval\(\)"):
        CustomLoss(RANDOM[loss])(torch.randn(1, 4), LABELS[:1])


OF_BATCH = {
    "size": lambda f, y: of_samples(f, y) / len(f),
    "mean weight": lambda f, y: of_samples(f, y) / (1.0 + y).mean(),
    "frequencies": lambda f, y: of_samples(f, y, weight=1 / torch.bincount(y, minlength=4).to(f).clamp_min(1)),
    "detached": lambda f, y: of_samples(f, y) * f.detach().std(),
    "place": lambda f, y: torch.arange(1.0, 10.0)[: len(y)] * of_samples(f, y),
    "counts": lambda f, y: of_samples(f, y) / torch.bincount(y, minlength=4)[y],
}


@guards(
    "functional/loss_calls.py",
    "return _differ(in_parts, losses[torch.cat(parts)], logits)",
    "return _differ(losses, losses, logits)",
)
@pytest.mark.parametrize("loss", OF_BATCH)
def test_losses_that_depend_on_the_rest_of_the_batch_are_refused(loss):
    with pytest.raises(
        BatchError, match="on other samples of its batch, or on its place .*number of samples.* class_weight="
    ):
        CustomLoss(OF_BATCH[loss])(torch.randn(7, 4), LABELS)


@guards("functional/loss_calls.py", "torch.cat([order, halves[0]])", "order", ids="counts")
@pytest.mark.parametrize("loss", OF_BATCH)
def test_targets_that_all_differ_show_that_a_loss_depends_on_the_rest_of_the_batch(loss):
    with pytest.raises(BatchError, match="on other samples"):
        CustomLoss(OF_BATCH[loss])(torch.randn(4, 4), torch.arange(4))


@guards("functional/loss_argument.py", "if comparison.targets_differ:", "if True:")
@pytest.mark.parametrize("first", [torch.full((7,), 2), torch.full((7,), 2.0), torch.full((7, 4), 0.5)], ids=str)
def test_calls_are_compared_until_targets_have_differed(first):
    def mean_target(f, y):
        return f.square().sum(1) * y.reshape(len(f), -1).double().mean()

    loss = CustomLoss(mean_target)
    for _ in range(2):
        loss(torch.randn(7, 4), first)
    with pytest.raises(BatchError, match="on other samples"):
        loss(torch.randn(7, 4), first + torch.arange(7).reshape(-1, *[1] * (first.ndim - 1)))


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


@pytest.mark.parametrize(
    "targets", [torch.tensor(1), torch.ones(3), torch.ones(7, 0), LABELS + 1j, LABELS > 0], ids=str
)
def test_targets_of_any_shape_and_type_are_taken(targets):
    assert CustomLoss(lambda f, y: f.square().sum(1))(torch.randn(7, 4), targets).residual.shape == (7, 4)
    with pytest.raises(FlatnessError, match="is random"):
        CustomLoss(lambda f, y: f.square().sum(1) * random.random())(torch.randn(7, 4), targets)


class Counted(nn.Module):
    """Notes its calls: whether autograd records them, and how many samples they have."""

    def __init__(self):
        super().__init__()
        self.calls, self.mixes = [], False

    def forward(self, f, y):
        self.calls.append((f.requires_grad, len(f)))
        return of_samples(f, y) / (len(f) if self.mixes else 1)


def calls_of(loss, samples=7):
    """The calls of its function for one batch."""
    loss.function.calls.clear()
    loss(torch.randn(samples, 4), LABELS[:samples])
    return list(loss.function.calls)


ALONE = [(True, 7)]
COMPARED = [*ALONE, *((False, samples) for samples in (7, 2, 2, 2, 1, 11))]


@guards("functional/loss_calls.py", " and self.batches + 1 < COMPARED_EVERY", "")
def test_calls_are_compared_on_the_first_of_sixteen_batches():
    loss = CustomLoss(Counted())
    assert [calls_of(loss) for _ in range(34)] == [COMPARED, *15 * [ALONE], COMPARED, *15 * [ALONE], COMPARED, ALONE]


@guards("functional/loss_calls.py", "samples <= self.samples and ", "")
def test_calls_are_compared_on_a_batch_with_more_samples_than_before():
    loss = CustomLoss(Counted())
    assert [len(calls_of(loss, samples)) for samples in (4, 4, 2, 7, 7, 1)] == [7, 1, 1, 7, 1, 1]


def test_a_loss_is_refused_as_often_as_it_is_called():
    loss = CustomLoss(Counted())
    loss.function.mixes = True
    for _ in range(2):
        with pytest.raises(BatchError, match="on other samples"):
            calls_of(loss)


@guards("functional/loss_argument.py", "return loss.uncompared()", "return loss")
def test_every_measurement_compares_calls_by_itself():
    loss = CustomLoss(Counted())
    assert calls_of(loss) == COMPARED
    assert calls_of(find_loss(loss)) == COMPARED
    assert calls_of(loss) == ALONE


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_is_a_loss(copied):
    loss = CustomLoss(Counted())
    assert calls_of(loss) == COMPARED
    assert len(calls_of(copied(loss), 4)) == 1
    assert len(calls_of(copied(loss))) == 1


@guards("functional/loss_argument.py", "except RuntimeError:  #", "except ZeroDivisionError:  #")
def test_a_loss_may_differentiate_the_logits_itself():
    def penalised(f, y):
        (gradient,) = torch.autograd.grad(of_samples(f, y).sum(), f, create_graph=True)
        return of_samples(f, y) + gradient.square().sum(1)

    def mixing(f, y):
        return penalised(f, y) / len(f)

    assert CustomLoss(penalised)(torch.randn(7, 4), LABELS).residual.shape == (7, 4)
    with pytest.raises(BatchError, match="on other samples"):
        CustomLoss(mixing)(torch.randn(7, 4), LABELS)


def in_half(logits, targets):
    """Enables autocast, and fails on float64, which autocast leaves alone."""
    assert logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(logits @ torch.eye(3), targets, reduction="none")


@guards("functional.autocast:WithoutAutocast.__torch_function__", body="return func(*args, **(kwargs or {}))")
def test_a_loss_that_enables_autocast_is_computed_without():
    logits, targets = torch.randn(6, 3), torch.arange(6) % 3
    assert_close(
        CustomLoss(in_half)(logits, targets).residual, CrossEntropy()(logits, targets).residual, rtol=0, atol=1e-5
    )
