"""A forward pass of validation, and the same when it is observed, as in the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import networks
from lightning_flatness.measure.flatness import Measurement


def forward(net: nn.Module, x: Tensor) -> None:
    """What validation does anyway."""
    with torch.no_grad():
        net(x)


def observed(net: nn.Module, batch: networks.Batch, **options: Any) -> Callable[[], None]:
    """A forward pass that is observed and what is made of it; the trial that goes before a measurement is done here."""
    x, y = batch
    measurement = Measurement(net, **options)
    with torch.no_grad():
        reason = measurement.why_not_live(x, y)
    assert not reason, reason

    def step() -> None:
        heard = measurement.listen(x)
        with torch.no_grad(), heard:
            net(x)
        assert not heard.reason, heard.reason
        measurement.update_observed(heard, y)
        heard.release()

    return step
