"""The spectrum keeps as many vectors as it says."""

import gc

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from tests.spectra import own_value


class Weighs(nn.Module):
    """Adds up the bytes of all tensors that live while it runs, at some of its calls."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x):
        PASSES.append(1)
        if len(PASSES) % 4 == 0:
            self.weigh()
        return self.weight.pow(4).sum().expand(len(x), 1)

    def weigh(self):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living_tensors()}
        WEIGHED.append(sum(storages.values()))


def living_tensors():
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]


def most_bytes(num_probes, num_batches, size=20_000):
    PASSES.clear()
    WEIGHED.clear()
    batches = [(torch.zeros(2, 1), torch.zeros(2, 1))] * num_batches
    gc.collect()  # of tests before
    before = sum(t.untyped_storage().nbytes() for t in living_tensors())
    options = {"num_probes": num_probes, "num_steps": 20, "top_k": 0}
    lf.hessian_spectrum(Weighs(size), batches, loss=own_value, **options)
    return max(WEIGHED) - before, size * 8


PASSES, WEIGHED = [], []


@pytest.mark.slow
def test_memory_does_not_grow_with_probes_or_batches():
    most, vector = most_bytes(1, 1)
    more, _ = most_bytes(2, 2)
    assert more <= most + vector / 10
    assert most >= 20 * vector  # the basis: the counting counts
    assert most <= 30 * vector
