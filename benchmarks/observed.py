"""The forward pass of a validation, and the same pass when the callback observes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import networks
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.samples import FIRST_SAMPLES


def forward(net: nn.Module, x: Tensor) -> None:
    """Run the forward pass of a validation."""
    with torch.no_grad():
        net(x)


def observed(net: nn.Module, batch: networks.Batch, defers_checks: bool = True, **options: Any) -> Callable[[], None]:
    """Return a function that observes one forward pass and measures it.

    What a measurement begins with is done here: the trial, and batches until the spread of the channels is known, which
    samples wait for. Without ``defers_checks`` every check of a tensor waits for the device by itself.
    """
    x, y = batch
    measurement = Measurement(net, **options)
    with torch.no_grad():
        reason = measurement.why_not_live(x, y)
    assert not reason, reason
    measurement._observer._defers_checks = defers_checks

    def step() -> None:
        observation = measurement.listen(x)
        with torch.no_grad(), observation:
            net(x)
        assert not observation.reason, observation.reason
        measurement.update_observed(observation, y)
        measurement.settle_when_due()
        observation.release()

    for _ in range(math.ceil(FIRST_SAMPLES / len(y))):
        step()
    return step
