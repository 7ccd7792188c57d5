"""Compare the time of a training step per network: in a stack that is trained at once, and for a network alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from studies.families import CIFAR, DIGITS, Configuration
from studies.networks import build
from studies.running import Settings
from studies.stacked import MOMENTUM, Optimizer, Stack
from studies.tables import write_rows

SIZES = (1, 3, 6, 18, 36)
REPEATS = 7


def run(settings: Settings, console: Console) -> None:
    """Time training steps of ``DIGITS`` and ``CIFAR`` networks, on one thread of a CPU or on the GPU."""
    torch.set_num_threads(1)
    rows = []
    for data, centre, batches, shape in (
        ("digits", DIGITS, (10, 100), (1, 8, 8)),
        ("cifar10", CIFAR, (50,), (3, 32, 32)),
    ):
        for batch_size in batches:
            configuration = replace(centre, batch_size=batch_size)
            alone = median(one_by_one(configuration, shape, settings.device), settings.device)
            for size in SIZES if data == "digits" else SIZES[:4]:
                together = median(stacked(configuration, shape, size, settings.device), settings.device) / size
                rows.append(
                    {"data": data, "batch_size": batch_size, "networks": size, "device": settings.device,
                     "seconds_alone": alone, "seconds_stacked": together, "ratio": alone / together}
                )  # fmt: skip
                console.print(f"{data}, batches of {batch_size}, {size} at once: {alone / together:.1f} x faster")
    write_rows(settings.results / "speed.csv", rows)


def one_by_one(configuration: Configuration, shape: tuple[int, ...], device: str) -> Callable[[], None]:
    model = build(configuration, shape[0]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=MOMENTUM)
    images = torch.randn(configuration.batch_size, *shape, device=device)
    labels = torch.arange(configuration.batch_size, device=device) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def stacked(configuration: Configuration, shape: tuple[int, ...], size: int, device: str) -> Callable[[], None]:
    models = [build(replace(configuration, seed=seed), shape[0]).to(device) for seed in range(size)]
    stack, rates = Stack(models), torch.full((size,), 0.01, device=device)
    optimizer = Optimizer("sgd", stack, rates, 0 * rates)
    images = torch.randn(size, configuration.batch_size, *shape, device=device)
    labels = (torch.arange(configuration.batch_size, device=device) % 10).repeat(size, 1)
    return lambda: optimizer.step(stack, images, labels)


def median(step: Callable[[], None], device: str) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
