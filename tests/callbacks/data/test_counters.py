"""Counters of a data set are put back, unless they belong to a cache or an open file."""

import io
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lightning_flatness.callbacks.data.counters import OwnCounters
from tests.guarding import guards


class Reads:
    """Holds the latest block of samples that was read, and its number."""

    def __init__(self, block):
        self.block, self.number, self.inner = block, 0, torch.utils.data.Subset(self, [0])

    def read(self, number):
        if isinstance(self.block, (torch.Tensor, np.ndarray)):
            self.block += number
        elif isinstance(self.block, OrderedDict):
            self.block[number] = self.block.popitem(last=False)
        elif isinstance(self.block, list):
            self.block[0] = object()
        elif isinstance(self.block, io.StringIO):
            self.block.seek(number)
        else:
            self.block = object()
        self.number = number


BLOCKS = {
    "tensor": lambda: torch.zeros(2),
    "array": lambda: np.zeros((2, 3)),
    "dictionary": lambda: OrderedDict({0: 0, 1: 1}),
    "list": lambda: [0, 1],
    "file": lambda: io.StringIO("some text"),
    "object": object,
}


@guards("callbacks/data/counters.py", "and _others(part) == others", "", ids="object")
@guards("callbacks.data.counters:_content", returns=None, ids="tensor")
@guards("callbacks/data/counters.py", 'any(hasattr(type(value), "seek") for value in attributes.values())', "False")
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_number_of_a_block_stays_with_the_block(kind):
    data = Reads(BLOCKS[kind]())
    with OwnCounters(data.inner).used():
        data.read(3)
    assert data.number == 3


class Counting:
    number = 0

    def read(self, seen):
        self.number += 1
        seen.append(self.number)
        raise ValueError("no sample")


def test_counters_go_on_in_the_next_block():
    data, seen = Counting(), []
    counters = OwnCounters([data])
    for _ in range(2):
        with pytest.raises(ValueError, match="no sample"), counters.used():
            data.read(seen)
        assert data.number == 0
    assert seen == [1, 2]
