"""Measure how time and memory grow with the size of a problem, as exponents of power laws.

An exponent is the slope of a straight line through the logarithms of measured points. Every point is measured in a
separate process: first the peak of memory, without the batch and the network, and then the median of several times. The
exponent of time is below that of the leading term as long as constant parts of the time are not small.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.rows import Row
from benchmarks.timing import apart

# By name: what varies, the measured layers, the points, arguments of point() (zero: it varies), and the goals for the
# exponents of time and memory.
CASES: dict[str, tuple[str, str, list[int], dict[str, Any], float | None, float | None]] = {
    "N": ("images in a batch", "last", [256, 512, 1024, 2048], {"samples": 0}, 1.1, 0.1),
    "batches": ("batches of 64 images", "last", [1, 2, 4, 8], {"batches": 0}, 1.1, 0.1),
    "K": ("classes, last layer", "last", [10, 30, 100, 300, 1000], {"classes": 0}, 1.0, 0.1),
    "K of all layers": ("classes, all layers", "all", [5, 10, 20, 40], {"classes": 0}, 1.1, 0.1),
    "P": ("positions of the last layer", "last", [64, 144, 256, 576], {"positions": 0}, None, None),
    "S": ("filters of the last layer", "last", [64, 128, 256, 512], {"filters": 0, "samples": 16}, None, None),
    "depth": ("layers, all of them", "all", [8, 14, 20, 32], {"depth": 0, "samples": 16}, 1.1, None),
}
FUNCTION = "benchmarks.growth:point"


def rows() -> list[Row]:
    table = []
    for name, (what, _, points, _, time, memory) in CASES.items():
        shown = f"growth with {name} ({what}: {points[0]} to {points[-1]})"
        table.append(Row("growth", f"{shown}: time", "exponent", "exponent", time))
        table.append(Row("growth", f"{shown}: memory", "exponent", "exponent", memory))
    return table


def point(
    layers: str,
    samples: int = 64,
    batches: int = 1,
    classes: int = 10,
    positions: int = 64,
    filters: int = 64,
    depth: int = 14,  # with depth 8, the convolution that runs last would be a 1x1 shortcut
) -> tuple[Callable[[], object], ...]:
    """Return two functions for a ResNet for CIFAR: a warm-up and a measurement.

    ``positions`` are the output positions of the last convolution, (image size / 4)².
    """
    torch.manual_seed(0)
    net = networks.resnet20(classes, depth, filters // 4)
    data = networks.images(samples, 4 * math.isqrt(positions), classes)
    few = data[0][:2], data[1][:2]
    return partial(taken, net, [few], layers), partial(taken, net, [data] * batches, layers)


def taken(net: nn.Module, batches: list[networks.Batch], layers: str) -> None:
    lf.measure_flatness(net, batches, layers=layers, tolerance=0, progress=False)


def slope(points: list[int], values: list[float]) -> float:
    """Fit a straight line to the logarithms of ``points`` and ``values`` by least squares; return its slope.

    Example:
        >>> round(slope([1, 2, 4], [3.0, 6.0, 12.0]), 6)
        1.0
    """
    x = torch.tensor(points, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).clamp_min(1.0e-9).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def measure(quick: bool) -> list[Row]:
    results, expected = [], iter(rows())
    for _, layers, points, fixed, _, _ in CASES.values():
        points = points[:2] if quick else points
        (varied,) = (key for key, value in fixed.items() if value == 0)
        measured = [apart(FUNCTION, 1 if quick else 3, layers=layers, **{**fixed, varied: value}) for value in points]
        seconds = [statistics.median(one["seconds"]) for one in measured]
        peaks = [one["peak"] / 1e6 for one in measured]
        raw = {f"{varied}={value}, s": one["seconds"] for value, one in zip(points, measured, strict=True)}
        shown = ", ".join(f"{value}: {s:.2f} s" for value, s in zip(points, seconds, strict=True))
        results.append(next(expected).measured(slope(points, seconds), shown, raw))
        shown = ", ".join(f"{value}: {m:.0f} MB" for value, m in zip(points, peaks, strict=True))
        results.append(next(expected).measured(slope(points, peaks), shown))
    return results
