"""Measure costs on a GPU: validation and training epochs with and without the callback, and the parts of a batch.

All batches are in memory, so that the time of loading is not measured. Runs with and without the callback take turns,
and their medians are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.profiler import ProfilerActivity

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.gpu.correctness import Row, randomised, tried
from benchmarks.timing import interleaved, peak, synchronize
from benchmarks.training import Classifier, quiet, ready, trainer_of

# network, image size, classes, batch size, batches, precision, whether it is compiled; the most important come first
SETUPS = (
    ("resnet18", 32, 10, 64, 300, "32-true", False),
    ("resnet18", 32, 10, 64, 300, "bf16-mixed", False),
    ("resnet50", 224, 1000, 256, 40, "bf16-mixed", False),
    ("resnet20", 32, 10, 64, 300, "32-true", False),
    ("resnet18", 32, 10, 512, 60, "32-true", False),
    ("resnet18", 32, 10, 512, 60, "bf16-mixed", False),
    ("resnet18", 32, 10, 64, 300, "32-true", True),
    ("resnet18", 32, 10, 64, 300, "bf16-mixed", True),
    ("resnet50", 224, 1000, 256, 40, "bf16-mixed", True),
)


def named(network: str, size: int, batch: int, precision: str, compiled: bool) -> str:
    title = {"resnet18": "ResNet-18", "resnet20": "ResNet-20", "resnet50": "ResNet-50"}[network]
    return f"{title}, {size}x{size}, batches of {batch}, {precision}{', compiled' * compiled}"


def net_of(network: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return randomised(getattr(networks, network)(), networks.images(16, size)[0])


def validation(device: str, quick: bool, until: float) -> Iterator[Row]:
    for network, size, classes, batch, batches, precision, compiled in SETUPS[:2] if quick else SETUPS:
        if time.monotonic() > until - 45:
            yield {"what": named(network, size, batch, precision, compiled), "failed": "no time was left"}
            continue

        def case() -> Row:
            loader = ready(batch, size, classes, 3 if quick else batches)  # noqa: B023
            model = Classifier(net_of(network, size), compiled)  # noqa: B023

            def run(with_callback: bool) -> None:
                callbacks = [lf.FlatnessCallback(summary=False, figures=False)] * with_callback
                trainer_of(device, callbacks, precision=precision).validate(model, loader, verbose=False)  # noqa: B023

            tasks = {"with": partial(run, True), "without": partial(run, False)}
            times = interleaved(tasks, 1 if quick else 3, device, budget=20)
            peaks = {name: peak(task, device) / 1e6 for name, task in tasks.items()}
            return {
                "ratio": times.ratio("with", "without"),
                "without, s": times.median("without"),
                "memory": peaks["with"] / peaks["without"],
                "repeats": [round(t, 3) for t in (*times.wall["with"], *times.wall["without"])],
            }

        yield tried(f"validation, {named(network, size, batch, precision, compiled)}", case)


def training(device: str, quick: bool, until: float) -> Iterator[Row]:
    """Yield rows for a training epoch in Lightning that ends with a validation of a fifth as many images."""
    for precision in ("32-true", "bf16-mixed"):
        for data in ("val", "train"):
            if time.monotonic() > until - 20:
                return

            def case() -> Row:
                batches = 4 if quick else 200
                loaders = ready(64, 32, 10, batches), ready(64, 32, 10, batches // 5)

                def run(with_callback: bool) -> None:
                    options = {"max_samples": max(8, batches * 64 // 12)} if data == "train" else {}  # noqa: B023
                    callbacks = [lf.FlatnessCallback(data=data, summary=False, **options)] * with_callback  # noqa: B023
                    model = Classifier(net_of("resnet18", 32))
                    trainer_of(device, callbacks, precision=precision, max_epochs=1).fit(model, *loaders)  # noqa: B023

                times = interleaved({"with": partial(run, True), "without": partial(run, False)}, 3, device, budget=15)
                return {"ratio": times.ratio("with", "without"), "without, s": times.median("without")}

            yield tried(f"training epoch, ResNet-18, 32x32, batches of 64, {precision}, data='{data}'", case)


def profile(device: str, quick: bool, until: float) -> Iterator[Row]:
    """Yield rows for one observed batch: the times of its parts, its whole time, and its most expensive kernels."""
    from benchmarks.live_profile import measure
    from benchmarks.observed import forward, observed

    for network, size, classes, batch in (("resnet18", 32, 10, 64), ("resnet50", 224, 1000, 64))[: 1 if quick else 2]:
        net = net_of(network, size).to(device)
        x, y = networks.images(batch, size, classes, device)
        what = named(network, size, batch, "float32", False)

        def parts() -> Row:
            found = measure(device, True, network, batch, classes)  # noqa: B023
            return {part.name: round(1e3 * part.seconds, 3) for part in found}

        yield tried(f"milliseconds of the parts, each waited for, {what}", parts)

        def whole() -> Row:
            step, at_once = observed(net, (x, y)), observed(net, (x, y), defers_checks=False)  # noqa: B023
            tasks = {"with": step, "checks one by one": at_once, "without": partial(forward, net, x)}  # noqa: B023
            times = interleaved(tasks, 5 if quick else 50, device)
            return {
                "with, checks evaluated one by one, ms": 1e3 * times.median("checks one by one"),
                "with, ms": 1e3 * times.median("with"),
                "without, ms": 1e3 * times.median("without"),
                "processor, with, ms": 1e3 * sorted(times.processor["with"])[len(times.processor["with"]) // 2],
            }

        yield tried(f"one batch, {what}", whole)

        def kernels() -> Row:
            step = observed(net, (x, y))  # noqa: B023
            for _ in range(3):
                step()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
            with torch.profiler.profile(activities=activities) as profiler:
                step()
                synchronize(device)
            key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
            rows = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))
            if device == "cuda":
                on_device = [e for e in rows if str(e.device_type).endswith("CUDA")]
                launches = sum(e.count for e in rows if "LaunchKernel" in e.key)
                total = sum(e.self_device_time_total for e in on_device)
            else:
                on_device, launches, total = rows, 0, sum(e.self_cpu_time_total for e in rows)
            top = [[e.key[:90], e.count, round(getattr(e, key) / 1e3, 3)] for e in on_device[:16]]
            return {"kernels, ms": total / 1e3, "launches": launches, "top": top}

        yield tried(f"kernels of one observed batch, {what}", kernels)
    quiet()
