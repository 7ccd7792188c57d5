"""Run a forward pass as a validation does, plain or observed by a measurement."""

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
    """Run a forward pass without gradients, as in validation."""
    with torch.no_grad():
        net(x)


def observed(net: nn.Module, batch: networks.Batch, defers_checks: bool = True, **options: Any) -> Callable[[], None]:
    """Return a function that runs, observes and measures one forward pass.

    The beginning of the measurement runs here, so that the function does not include it: the trial on a few samples,
    and the first batches, which are held until the spread of the channels is known. With ``defers_checks=False``, every
    check of a tensor waits for the device separately.
    """
    x, y = batch
    measurement = Measurement(net, **options)
    with torch.no_grad():
        reason = measurement.observer.why_not_live(x, y)
    assert not reason, reason
    measurement.observer._defers_checks = defers_checks

    def step() -> None:
        observation = measurement.observer.listen(x)
        with torch.no_grad(), observation:
            net(x)
        assert not observation.reason, observation.reason
        measurement.update_observed(observation, y)
        measurement.settle_when_due()
        observation.release()

    for _ in range(math.ceil(FIRST_SAMPLES / len(y))):
        step()
    return step
