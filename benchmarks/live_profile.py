"""Measure where the time of an observed validation batch goes, and how far each part is from the machine's limit.

Timers are put around the functions that do the work. For each part, the multiplications are counted, and the bytes that
must be read and written at least once. The limit of a part is the time for its multiplications or its bytes, whichever
is longer, at the speeds that were measured in the same run.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import machine, networks
from benchmarks.timing import synchronize
from lightning_flatness.layers.certificates import FULL_EVERY
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.samples import FIRST_SAMPLES

# The parts of a batch, and the functions that are timed for them. If a part runs inside another part, its time counts
# for the inner part only.
REST = "what is left of `update_observed` (metric states, checks)"
TAIL = "certificates of the tail, slopes"
PARTS = {
    REST: "lightning_flatness.measure.flatness:Measurement.update_observed",
    "certificates of the layer": "lightning_flatness.layers.certify:_Certificates.certified_calls",
    TAIL: "lightning_flatness.layers.certify:certify_tail",
    "certificate of the head": "lightning_flatness.layers.certify:certify_head",
    "loss derivatives": "lightning_flatness.functional.losses:CrossEntropy.__call__",
    "contraction": "lightning_flatness.layers.observer:closed_form_layer",
    "patch Gram matrix": "lightning_flatness.functional.closed_form:patch_gram",
}
BARE, OBSERVED = "forward pass alone", "hooks and graph in the forward pass"
WHOLE = f"whole certificate of the tail, on one batch of {FULL_EVERY}"


@dataclass(frozen=True)
class Part:
    """A part of a batch, with its time and the operations and bytes that it needs (NaN if these are not counted)."""

    name: str
    seconds: float
    flops: float = float("nan")
    bytes: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def timers(device: str) -> Iterator[dict[str, float]]:
    """In a ``with`` block, time the functions of ``PARTS``, and yield their seconds by part.

    The time of a part does not include other parts that run inside it. A function that does not exist is an error.
    """
    seconds_of: dict[str, float] = defaultdict(float)
    inner: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*arguments, **keywords)
            finally:
                synchronize(device)
                whole = time.perf_counter() - start
                seconds_of[name] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return wrapper

    with ExitStack() as stack:
        for name, place in PARTS.items():
            module, path = place.split(":")
            owner: Any = importlib.import_module(module)
            *outer, last = path.split(".")
            for attribute in outer:
                owner = getattr(owner, attribute)
            stack.enter_context(patch.object(owner, last, timed(name, getattr(owner, last))))
        yield seconds_of


def counted(net: nn.Module, layer: nn.Conv2d, x: torch.Tensor, classes: int) -> dict[str, tuple[float, float]]:
    """Count the operations and bytes that each part needs for a batch in float32.

    A multiplication with an addition counts as two operations.
    """
    flops, shapes = 0, {}

    def of_layer(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * output.numel() * prod(module.weight.shape[1:])
        shapes[module] = inputs[0].shape, output.shape

    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [module.register_forward_hook(of_layer) for module in layers]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    (samples, channels, *size), (_, filters, *output) = shapes[layer]
    moved = 4 * sum(prod(a) + prod(b) for a, b in shapes.values()) + 4 * sum(p.numel() for p in net.parameters())
    pixels, positions, offsets = (
        prod(n + 2 * p for n, p in zip(size, layer.padding, strict=True)),
        prod(output),
        prod(layer.kernel_size),
    )
    z = 4 * samples * filters * positions
    gram = (
        samples * (2 * pixels**2 * channels + offsets * positions**2),
        4 * samples * (channels * prod(size) + pixels**2 + positions**2),
    )
    contraction = (
        # The product a Γ, and half of (aΓ)aᵀ, of VᵀΛV and of their product, because these three are symmetric.
        samples * (2 * filters * positions**2 + filters**2 * (positions + classes + 1)),
        z + 4 * samples * positions**2 + 8 * filters**2,
    )
    return {
        BARE: (flops, moved),
        "patch Gram matrix": gram,
        "contraction": contraction,
        # Three backward passes through the tail: slopes, channel map, and a random cotangent. Second derivatives are 0.
        TAIL: (3 * samples * filters * positions, 3 * 2 * z),
        "loss derivatives": (float("nan"), 4 * samples * classes + 8 * 3 * samples * classes),
    }


def measure(device: str, quick: bool, name: str = "resnet18", samples: int = 64, classes: int = 10) -> list[Part]:
    """Measure the parts of a batch; return medians over repeats, in the order in which the parts end."""
    torch.manual_seed(0)
    net = getattr(networks, name)().to(device)
    x, y = networks.images(samples, 224 if name == "resnet50" else 32, classes, device)
    measurement = Measurement(net)
    with torch.no_grad():
        reason = measurement.observer.why_not_live(x, y)
    if reason:
        raise RuntimeError(f"not observed: {reason}")
    layer = net.get_submodule(next(iter(measurement.layers)))
    first = batch(net, measurement, x, y, device)
    for _ in range(math.ceil(FIRST_SAMPLES / samples)):  # samples are held until the channels' spread is known
        batch(net, measurement, x, y, device)
    raw: dict[str, list[float]] = defaultdict(list)
    for _ in range(2 if quick else 9):
        for part, value in batch(net, measurement, x, y, device).items():
            raw[part].append(value)
    needs = counted(net, layer, x, classes)
    medians = {part: statistics.median(values) for part, values in raw.items()}
    medians[OBSERVED] -= medians[BARE]
    medians[WHOLE] = max(0.0, first[TAIL] - medians[TAIL]) / FULL_EVERY
    return [Part(part, value, *needs.get(part, ())) for part, value in medians.items()]


def batch(net: nn.Module, measurement: Measurement, x: torch.Tensor, y: torch.Tensor, device: str) -> dict[str, float]:
    """Time a forward pass that is not observed, and then the parts of an observed batch with the same samples."""

    def seconds(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad():
        seconds_of = {BARE: seconds(partial(net, x))}
        observation = measurement.observer.listen(x)
        with observation:
            seconds_of[OBSERVED] = seconds(partial(net, x))
    if observation.reason:
        raise RuntimeError(f"not observed: {observation.reason}")
    with timers(device) as parts:
        measurement.update_observed(observation, y)
        measurement.settle_when_due()
    observation.release()
    return seconds_of | parts


def lines(parts: list[Part], limits: dict[str, float]) -> list[str]:
    """Format the parts as a table in Markdown."""
    forward = next(part.seconds for part in parts if part.name == BARE)
    text = [
        "| part | ms | of a forward pass | GFLOP | MB | limit, ms | times the limit |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for part in parts:
        cells = [part.name, f"{1e3 * part.seconds:.2f}", f"{100 * part.seconds / forward:.1f} %", "", "", "", ""]
        at_least = max(
            [n / s for n, s in zip((part.flops, part.bytes), limits.values(), strict=True) if n == n], default=0
        )
        if at_least:
            cells[3:5] = ["" if n != n else f"{n / u:.3g}" for n, u in ((part.flops, 1e9), (part.bytes, 1e6))]
            cells[5:] = [f"{1e3 * at_least:.2f}", f"{part.seconds / at_least:.1f}"]
        text.append(f"| {' | '.join(cells)} |")
    added = sum(part.seconds for part in parts) - forward
    return [*text, f"| **added to the forward pass** | {1e3 * added:.2f} | {100 * added / forward:.1f} % | | | | |"]


def main() -> None:
    limits = machine.limits()
    print(limits)
    for name in ("resnet18", "resnet20"):
        print(f"\n{name}, 64 images of 32x32", *lines(measure("cpu", False, name), limits), sep="\n")


if __name__ == "__main__":
    main()
