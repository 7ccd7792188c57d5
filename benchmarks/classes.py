"""Measure the last convolution of a ResNet-50 with a thousand classes; compare with a forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.observed import forward, observed
from benchmarks.rows import Row
from benchmarks.timing import interleaved
from lightning_flatness.measure.measurement import Measurement

SAMPLES = 8
MASS = 1e-6  # share of the probability that the classes may carry that are not counted


def rows() -> list[Row]:
    against = f"a forward pass of the same {SAMPLES} images"
    what = "last convolution of a ResNet-50, 224x224, K=1000"
    return [
        Row("classes", f"{what}, all classes taken, forward observed", against, "percent", 0.35),
        Row("classes", f"{what}, about 150 classes carry the mass, forward observed", against, "percent", 0.15),
        Row("classes", f"{what}, all classes taken, forward of its own", against, "percent"),
    ]


def classes_needed(logits: Tensor) -> float:
    """Count the classes that carry all but ``MASS`` of a sample's probability; return the median over samples."""
    mass = logits.double().softmax(1).sort(1, descending=True).values.cumsum(1)
    return float((mass < 1 - MASS).sum(1).double().median()) + 1


def spread_logits(net: nn.Module, x: Tensor, wanted: int) -> float:
    """Scale the classifier, by bisection, so that ``classes_needed`` is about ``wanted``; return its value."""
    with torch.no_grad():
        logits, weight = net(x).double(), net.fc.weight.clone()
        low, high = 1.0, 2.0**20
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if classes_needed(middle * logits) > wanted else (low, middle)
        net.fc.weight.copy_(high * weight)
        net.fc.bias.mul_(high)
        return classes_needed(net(x))


def own(net: nn.Module, batch: networks.Batch) -> Callable[[], None]:
    """Return a function that runs a forward pass, and then a measurement with a forward pass of its own."""
    measurement = Measurement(net, tolerance=0.0)

    def step() -> None:
        forward(net, batch[0])
        measurement.update(*batch)

    step()
    return step


def measure(quick: bool) -> list[Row]:
    torch.manual_seed(0)
    net = networks.resnet50()
    x, y = networks.images(SAMPLES, 224, 1000)
    calibrate(net, x)
    repeats = 2 if quick else 7
    everything, by_mass, alone = rows()
    tasks = {
        "observed": observed(net, (x, y), tolerance=0.0),
        "own": own(net, (x, y)),
        "forward": lambda: forward(net, x),
    }
    times = interleaved(tasks, repeats)
    note = f"forward {times.median('forward'):.2f} s; "
    needed = spread_logits(net, x, 150)
    few = interleaved({"observed": observed(net, (x, y)), "forward": lambda: forward(net, x)}, repeats)
    return [
        everything.measured(times.ratio("observed", "forward"), note + times.spread("observed", "forward"), times.wall),
        by_mass.measured(
            few.ratio("observed", "forward"),
            f"{needed:.0f} classes carry all but {MASS:g}; {few.spread('observed', 'forward')}",
            few.wall,
        ),
        alone.measured(times.ratio("own", "forward"), times.spread("own", "forward")),
    ]


def calibrate(net: nn.Module, x: Tensor) -> None:
    """Set the running statistics of BatchNorm to those of ``x``.

    With the statistics of a new network, all logits would be nearly equal.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        net.train()(x)
    net.eval()
