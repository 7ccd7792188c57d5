"""What measuring all layers costs: time and peak memory beside BackPACK, bare backward passes and a training step.

    python benchmarks/all_layers.py [--samples 64] [--repeats 3] [--device cpu]

A ResNet-20 for CIFAR, all convolutions and the classifier, random data. Times: every repeat runs all tasks in turn, on
one batch and the same threads; medians are shown, and all raw times below. Memory: every task runs in a process of its
own, after a warm-up on two images; shown is the peak of resident memory above what was resident before. The kernel
keeps that peak (VmHWM of Linux, set back before the task): a sampling thread could miss it, and ru_maxrss also has what
importing needed. On a GPU it is the peak of what torch allocates.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf


def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        first, second = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3, 1)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


def resnet(depth: int = 20, classes: int = 10) -> nn.Module:
    """The ResNet for CIFAR of He et al. 2016, with 1x1 convolutions as shortcuts where the shape changes."""
    layers = [*convolution(3, 16, 3, 1), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            layers.append(Residual(inputs, width, stride=1 if inputs == width else 2))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


def flatness(net: nn.Module, x: Tensor, y: Tensor) -> None:
    assert lf.measure_flatness(net, [(x, y)], layers="all", tolerance=0).exact


def extended(net: nn.Module) -> nn.Module:
    from backpack import extend

    return extend(net, use_converter=True).eval()


def diagonal(net: nn.Module, x: Tensor, y: Tensor) -> None:
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    with backpack(DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(net(x), y).backward()
    net.zero_grad()


def backward(net: nn.Module, x: Tensor, y: Tensor) -> None:
    outputs: list[Tensor] = []
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(lambda *passed: outputs.append(passed[2])) for layer in layers]
    logits = net(x)
    for handle in handles:
        handle.remove()
    for _ in range(logits.shape[1]):
        torch.autograd.grad(logits, outputs, torch.randn_like(logits), retain_graph=True)


def training(net: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(net(x), y).backward()
    net.zero_grad()


TASKS = {  # the task, the network for it, what it is, the goal
    "flatness": (flatness, nn.Module.eval, "(a) lightning_flatness, all layers", ""),
    "backpack": (diagonal, extended, "(b) BackPACK, DiagGGNExact", "b >= 7 a"),
    "backward": (backward, nn.Module.eval, "(c) K backward passes to all outputs", "a <= 2 c"),
    "training": (training, nn.Module.train, "(d) training step", "memory a <= 1.5 d"),
}


def prepared(name: str, net: nn.Module) -> Callable[[Tensor, Tensor], None]:
    return partial(TASKS[name][0], TASKS[name][1](deepcopy(net)))


def seconds(task: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    task()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(task: Callable[[], None], device: str) -> int:
    """Bytes at the peak of a task above what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before = resident("VmRSS")
    task()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) * 1024


def peak_apart(name: str, *options: str) -> float:
    """MB at the peak of a task in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1e6


def table(title: str, *headings: str) -> Table:
    columns = [Column(heading, justify="right" if index else "left") for index, heading in enumerate(headings)]
    return Table(*columns, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"samples": 64, "repeats": 3, "depth": 20, "classes": 10, "size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peak", choices=TASKS, help="print the bytes of one task and nothing else")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    net = resnet(options.depth, options.classes).to(options.device)
    x = torch.randn(options.samples, 3, options.size, options.size, device=options.device)
    y = torch.randint(options.classes, (options.samples,), device=options.device)
    if options.peak:
        run = prepared(options.peak, net)
        run(x[:2], y[:2])  # loads what is loaded on first use
        print(peak(partial(run, x, y), options.device))
        return

    tasks = {name: prepared(name, net) for name in TASKS if name != "backpack" or find_spec("backpack")}
    raw: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(options.repeats + 1):
        for name, run in tasks.items():
            duration = seconds(partial(run, x, y), options.device)
            raw[name] += [duration] if repeat else []  # the first is a warm-up
    medians = {name: statistics.median(times) for name, times in raw.items()}

    title = f"All layers of a ResNet-{options.depth}, {options.samples} images, {options.classes} classes"
    shown = table(title, "task", "time, s", "time a / this", "peak, MB", "peak a / this", "goal")
    memory = {name: peak_apart(name, *sys.argv[1:]) for name in tasks}
    for name in tasks:
        of_time, of_memory = (numbers["flatness"] / numbers[name] for numbers in (medians, memory))
        cells = f"{medians[name]:.3f}", f"{of_time:.2f}", f"{memory[name]:.0f}", f"{of_memory:.2f}"
        shown.add_row(TASKS[name][2], *cells, TASKS[name][3])

    growth = table("Peak memory, 32 images 16x16", "network", "K", "(a), MB", "(d), MB", "a / d")
    for depth, classes in ((8, 10), (8, 100), (8, 1000), (20, 10), (56, 10)):
        small = f"--depth={depth} --classes={classes} --size=16 --samples=32 --device={options.device}".split()
        a, d = (peak_apart(name, *small) for name in ("flatness", "training"))
        growth.add_row(f"ResNet-{depth}", str(classes), f"{a:.0f}", f"{d:.0f}", f"{a / d:.1f}")

    console = Console(width=120)
    console.print(shown, growth)
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, ", end="")
    console.print(f"{options.device}, torch {torch.__version__}")
    for name, times in raw.items():
        console.print(f"{TASKS[name][2]}: " + ", ".join(f"{t:.3f}" for t in times))


if __name__ == "__main__":
    main()
