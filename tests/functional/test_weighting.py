"""The matrices that values of single samples are taken with."""

import torch

from lightning_flatness.functional import weight_gram
from lightning_flatness.functional.weighting import Weighting
from tests.guarding import guards


@guards("functional/weighting.py", "deviations.to(kernel.device)", "deviations")
def test_the_spread_is_brought_to_the_device_of_the_kernel():
    kernel = torch.randn(4, 3, 2, 2).to("meta")
    weighting = Weighting.of(kernel, 1, weight_gram(kernel), torch.ones(3).double(), by_channel=False)
    assert weighting.normalized.device == kernel.device
    assert weighting.scaled(torch.zeros(5, 3, 6, 6, device="meta")).device == kernel.device
