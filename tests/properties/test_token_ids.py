"""Networks that read token ids, which are whole numbers, are measured and checked as others are."""

import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.testing import assert_matches_oracle


class Bag(nn.Module):
    """The mean of embedded tokens, behind a ReLU, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.classifier = nn.Embedding(11, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.classifier(self.hidden(self.embedding(tokens)).relu().mean(1))


def test_every_layer_is_that_of_autograd():
    torch.manual_seed(0)
    batch = torch.randint(11, (6, 7)), torch.randint(3, (6,))
    for layer in ("hidden", "classifier"):
        assert_matches_oracle(Bag(), batch, layer)
    assert lf.measure_flatness(Bag().double(), [batch], layers="all").exact
