"""Compare epochs with the callback to epochs without it, in the set-ups that people train in.

A set-up is a network on random images, a precision, compiled or not, and the data that the callback measures. Three
quantities are compared: the time of a validation epoch, the time of a training epoch that ends with a validation of a
fifth as many images, and the peak memory of a validation. The callback has its default options, but for the summary
and the figures, so that it measures the normalised relative flatness and sampling errors, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import lightning_flatness as lf
from benchmarks import machine, networks
from benchmarks.rows import Row
from benchmarks.timing import interleaved, peaks_apart
from benchmarks.training import Classifier, quiet, ready, trainer_of

FULL, HALF = "32-true", "bf16-mixed"
SHARE = 12  # with data="train", every twelfth training sample is measured
TIME, EPOCH, MEMORY = "validation epoch", "training epoch", "peak memory"


@dataclass(frozen=True)
class Setup:
    """One set-up, how many batches its epochs have (0: not run), and the largest ratios that we aim at."""

    network: str
    precision: str = FULL
    compiled: bool = False
    data: str = "val"
    size: int = 32
    classes: int = 10
    batch: int = 64
    validated: int = 0
    trained: int = 0
    goals: tuple[float | None, ...] = (None, None, None)  # validation epoch, training epoch, peak memory
    has_memory: bool = False

    @property
    def title(self) -> str:
        title = {"resnet18": "ResNet-18", "resnet20": "ResNet-20", "resnet50": "ResNet-50"}[self.network]
        parts = [f"{title}, {self.size}x{self.size}", self.precision, *["compiled"] * self.compiled]
        return ", ".join(parts) + (', `data="train"`' if self.data == "train" else "")

    @property
    def quantities(self) -> list[str]:
        """The quantities that are measured."""
        has = {TIME: self.validated, EPOCH: self.trained, MEMORY: self.has_memory}
        return [quantity for quantity, is_there in has.items() if is_there]


SETUPS = (
    Setup("resnet18", validated=157, trained=32, goals=(1.11, 1.05, 1.05), has_memory=True),
    Setup("resnet18", HALF, validated=24, goals=(1.23, None, None)),
    Setup("resnet18", compiled=True, validated=24, goals=(2.48, None, None)),
    Setup("resnet18", HALF, compiled=True, validated=24, goals=(2.83, None, None)),
    Setup("resnet20", validated=157, trained=60, goals=(1.26, None, None), has_memory=True),
    Setup("resnet20", data="train", trained=60),
    Setup("resnet20", compiled=True, validated=157),
    Setup("resnet20", HALF, validated=157, trained=60),
    Setup("resnet20", HALF, data="train", trained=60),
    Setup("resnet20", HALF, compiled=True, validated=157),
    Setup("resnet50", size=224, classes=1000, batch=8, validated=24),
    Setup("resnet50", HALF, size=224, classes=1000, batch=8, validated=24, goals=(1.63, None, None)),
)
AGAINST = "the same without the callback"


def rows() -> list[Row]:
    return [
        Row("setups", f"{setup.title}: {quantity}", AGAINST, "times", goal)
        for setup in SETUPS
        for quantity, goal in zip((TIME, EPOCH, MEMORY), setup.goals, strict=True)
        if quantity in setup.quantities
    ]


def callback_of(setup: Setup) -> lf.FlatnessCallback:
    options: dict[str, Any] = {}
    if setup.data == "train":
        options = {"data": "train", "max_samples": max(8, setup.trained * setup.batch // SHARE)}
    return lf.FlatnessCallback(summary=False, figures=False, **options)


def network_of(setup: Setup) -> nn.Module:
    torch.manual_seed(0)
    return getattr(networks, setup.network)()


def tasks_of(setup: Setup, quantity: str) -> dict[str, Callable[[], None]]:
    """Return two functions by name, which run an epoch ``"with"`` and ``"without"`` the callback."""
    batches = setup.validated if quantity == TIME else max(1, setup.trained // 5)
    validation = ready(setup.batch, setup.size, setup.classes, batches)
    training = ready(setup.batch, setup.size, setup.classes, max(1, setup.trained))
    model = Classifier(network_of(setup), setup.compiled)

    def run(with_callback: bool) -> None:
        options: dict[str, Any] = {"precision": setup.precision, "max_epochs": 1, "num_sanity_val_steps": 0}
        trainer = trainer_of("cpu", [callback_of(setup)] if with_callback else [], **options)
        if quantity == TIME:
            trainer.validate(model, validation, verbose=False)
        else:
            trainer.fit(Classifier(network_of(setup)), training, validation)

    return {"with": partial(run, True), "without": partial(run, False)}


def epoch(number: int, batches: int, with_callback: bool) -> tuple[Callable[[], None], ...]:
    """Return two functions, a short warm-up and a validation epoch of set-up ``number``, for measuring peak memory."""
    quiet()
    setup = SETUPS[number]
    model = Classifier(network_of(setup))

    def run(batches: int, samples: int) -> None:
        loader = ready(samples, setup.size, setup.classes, batches)
        trainer = trainer_of("cpu", [callback_of(setup)] if with_callback else [], precision=setup.precision)
        trainer.validate(model, loader, verbose=False)

    return partial(run, 1, 2), partial(run, batches, setup.batch)


def measure(quick: bool) -> list[Row]:
    expected, results = iter(rows()), []
    for number, setup in enumerate(SETUPS):
        for quantity in setup.quantities:
            row = next(expected)
            if setup.precision == HALF and not machine.has_bfloat16():
                results.append(row.failed("this processor has no instructions for bfloat16"))
            elif quantity == MEMORY:
                results.append(memory(row, number, quick))
            else:
                results.append(timed(row, setup, quantity, quick))
    return results


def timed(row: Row, setup: Setup, quantity: str, quick: bool) -> Row:
    if quick:
        setup = replace(setup, validated=min(2, setup.validated), trained=min(5, setup.trained))
    times = interleaved(tasks_of(setup, quantity), 1 if quick else 5, budget=90)
    batches = setup.validated if quantity == TIME else setup.trained
    note = (
        f"{batches} batches of {setup.batch}, {len(times.wall['with'])} runs, {times.median('without'):.2f} s without; "
    )
    return row.measured(times.ratio("with", "without"), note + times.spread("with", "without"), times.wall)


def memory(row: Row, number: int, quick: bool) -> Row:
    peaks = {
        name: peaks_apart("benchmarks.setups:epoch", 1 if quick else 5, number=number, batches=4, with_callback=choice)
        for name, choice in {"with": True, "without": False}.items()
    }
    a, b = (statistics.median(peaks[name]) for name in ("with", "without"))
    note = f"{a / 1e6:.0f} and {b / 1e6:.0f} MB above what the idle process has; 4 batches, {len(peaks['with'])} runs"
    return row.measured(a / b, note, {f"{name}, MB": [x / 1e6 for x in peaks[name]] for name in peaks})
