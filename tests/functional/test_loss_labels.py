"""Losses that differ have different labels; the same loss, made again, has the same one."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_flatness as lf
from lightning_flatness.functional import find_loss
from lightning_flatness.functional.loss_labels import content_of


def focal(gamma, wrong=0.0):
    def loss(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none") ** gamma + wrong

    return loss


class Focal(nn.Module):
    def __init__(self, gamma, weight):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", torch.tensor(weight), persistent=False)

    def forward(self, logits, targets):
        return F.cross_entropy(logits, targets, self.weight, reduction="none") ** self.gamma


class Method:
    def __init__(self, gamma):
        self.gamma = gamma

    def loss(self, logits, targets):
        return focal(self.gamma)(logits, targets)


def named(logits, targets):
    return focal(2)(logits, targets)


DIFFERENT = [
    [lambda: {"class_weight": [1, 2]}, lambda: {"class_weight": [1, 3]}, lambda: {"class_weight": [1, 2] * 9}],
    [lambda: {"class_weight": [1, 2, 3] * 9}, lambda: {"class_weight": [1, 2, 3] * 8 + [1, 3, 3]}],
    [lambda: {"label_smoothing": 0.1}, lambda: {"label_smoothing": 0.2}, lambda: {"ignore_index": 0}, dict],
    [lambda: {"loss": nn.NLLLoss()}, lambda: {"loss": nn.NLLLoss(torch.tensor([1.0, 2.0]))}],
    [lambda: {"loss": lambda f, y: f.sum(1)}, lambda: {"loss": lambda f, y: 9 * f.sum(1)}],
    [lambda: {"loss": lambda f, y: f.sum(1)}, lambda: {"loss": lambda f, y: f.amax(1)}],
    [lambda: {"loss": focal(1)}, lambda: {"loss": focal(2)}, lambda: {"loss": focal(1, 0.5)}],
    [lambda: {"loss": partial(named, wrong=1)}, lambda: {"loss": partial(named, wrong=2)}],
    [lambda: {"loss": Focal(1, [1.0])}, lambda: {"loss": Focal(2, [1.0])}, lambda: {"loss": Focal(1, [2.0])}],
    [lambda: {"loss": focal(np.ones(2))}, lambda: {"loss": focal(np.zeros(2))}, lambda: {"loss": focal(torch.ones(2))}],
    [lambda: {"loss": Method(1).loss}, lambda: {"loss": Method(2).loss}],
]


@pytest.mark.parametrize("makers", DIFFERENT)
def test_labels_differ_where_losses_do(makers):
    labels = [find_loss(**{"loss": "cross_entropy"} | make()).label for make in makers]
    assert len(set(labels)) == len(makers), labels
    assert labels == [find_loss(**{"loss": "cross_entropy"} | make()).label for make in makers]


def test_a_label_stays_while_parameters_are_trained():
    head = nn.Linear(2, 2)
    losses = [lambda f, y: head(f).sum(1), Method(head).loss]
    before = [find_loss(loss).label for loss in losses]
    head.weight.data += 1
    assert before == [find_loss(loss).label for loss in losses]


class Counts(Method):
    """Keeps the number of its calls."""

    def __call__(self, logits, targets):
        self.gamma += 1
        return F.cross_entropy(logits, targets, reduction="none")


def test_a_label_stays_while_a_loss_counts_its_calls():
    loss = find_loss(Counts(0))
    before = loss.label
    loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    assert loss.label == before


def test_a_landscape_is_resumed_though_a_loss_counts_its_calls():
    net, batches, loss = nn.Linear(2, 2), [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))], Counts(0)
    part = lf.loss_landscape(net, batches, steps=3, loss=loss)
    assert lf.loss_landscape(net, batches, steps=3, loss=loss, resume=part).complete
    with pytest.raises(lf.FlatnessError, match="differs in loss"):
        lf.loss_landscape(net, batches, steps=3, loss=Method(1).loss, resume=part)


def with_an_empty_cell():
    def loss(logits, targets):
        return later(logits, targets)

    if False:
        later = None
    return loss


class PerSample(nn.Module):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor):
        return F.cross_entropy(logits, targets, reduction="none")


UNREADABLE = {
    "sparse": lambda: Method(torch.eye(3).to_sparse()).loss,
    "meta": lambda: Method(torch.zeros(3, device="meta")).loss,
    "empty cell": with_an_empty_cell,
    "TorchScript": lambda: torch.jit.script(PerSample()),
}


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_loss_that_cannot_be_read_has_a_label(kind):
    assert find_loss(UNREADABLE[kind]()).label.partition(" #")[0] in ("loss", "RecursiveScriptModule")


def test_a_large_object_is_read_in_part():
    assert len(repr(content_of([[[0] * 100] * 100] * 100))) < 200_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "cross_entropy"),
        ({"class_weight": [1.0, 1.0]}, "cross_entropy"),
        ({"loss": nn.CrossEntropyLoss(torch.tensor([1, 0.1]))}, "cross_entropy(class_weight=[1, 0.1])"),
        (
            {"label_smoothing": 0.1, "ignore_index": 3, "class_weight": [1, 2]},
            "cross_entropy(label_smoothing=0.1, class_weight=[1, 2], ignore_index=3)",
        ),
        ({"loss": "mse"}, "mse"),
        ({"loss": named}, "named"),
    ],
)
def test_labels_are_short(options, expected):
    assert find_loss(**{"loss": "cross_entropy"} | options).label == expected
