"""Coordinates of points from what users give."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import lightning_flatness as lf
from tests.measure.landscapes import BATCHES, net


@pytest.mark.parametrize(
    "options",
    [
        {"steps": np.int64(3)},
        {"steps": [np.int32(3), torch.tensor(3)]},
        {"steps": np.array([3, 3])},
        {"span": np.float32(1.0)},
        {"span": torch.tensor(1.0)},
        {"span": np.array([-1.0, 1.0])},
        {"span": torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])},
        {"span": (torch.tensor([-1.0, 1.0]), [np.float64(-1.0), 1])},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(options):
    model = net()
    actual = lf.loss_landscape(model, BATCHES, **{"steps": 3, **options})
    assert_close(actual.losses, lf.loss_landscape(model, BATCHES, steps=3).losses, rtol=0, atol=0)
