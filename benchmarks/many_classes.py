"""What a thousand classes cost: the last convolution of a ResNet-50 by the closed form, the first by sampling.

    python benchmarks/many_classes.py [--samples 8] [--repeats 5] [--size 224]

Random weights; the logits are spread so that all classes, or about 150, or a few carry the mass. Times are medians of
repeats within one run, as parts of a forward pass of the same batch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torchvision.models import resnet50

import lightning_flatness as lf
from lightning_flatness.functional import ClassCurvature, ConvolutionGeometry, closed_form_block_traces


def seconds(task: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first is a warm-up


def last_convolution(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the last convolution reads, and its slopes."""
    seen: dict[str, Tensor] = {}
    handles = [
        net.layer4[2].conv3.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], z=output)),
        net.fc.register_forward_pre_hook(lambda _, inputs: seen.update(g=inputs[0])),
    ]
    net(x)
    for handle in handles:
        handle.remove()
    (slopes,) = torch.autograd.grad(seen["g"].sum(), seen["z"])
    return seen["x"].detach(), slopes


def with_mass(samples: int, spread: float) -> ClassCurvature:
    logits = spread * torch.randn(samples, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pi = logits.softmax(1)
    return ClassCurvature(pi, pi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"samples": 8, "repeats": 5, "size": 224}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    net = resnet50().eval()
    x = torch.randn(options.samples, 3, options.size, options.size)
    with torch.no_grad():
        forward = seconds(lambda: net(x), options.repeats)
    inputs, slopes = last_convolution(net, x)
    geometry = ConvolutionGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    head, gram = net.fc.weight.detach(), net.layer4[2].conv3.weight.detach().flatten(1).double()
    gram = gram @ gram.T

    columns = [Column(h, justify="right") for h in ("spread", "classes for 1-1e-6", "classes", "part of a forward")]
    shown = Table(
        *columns, Column("relative change", justify="right"), title="ResNet-50, last convolution, 1000 classes"
    )
    for spread in (0.0, 3.0, 6.0, 9.0, 20.0):
        curvature = with_mass(options.samples, spread)
        mass = curvature.weights.sort(1, descending=True).values.cumsum(1)
        needed = int((mass < 1 - 1e-6).sum(1).max()) + 1
        found = {}
        for tolerance in (0.0, 1e-8):
            arguments = (inputs, geometry, slopes, head, curvature, tolerance)
            taken = seconds(lambda a=arguments: closed_form_block_traces(*a), options.repeats)
            found[tolerance] = float((closed_form_block_traces(*arguments)[0] * gram).sum())
            change = abs(found[tolerance] / found[0.0] - 1)
            kind = "all" if tolerance == 0 else f"share {tolerance:g} left out"
            shown.add_row(
                f"{spread:g}", str(needed), kind, f"{taken / forward:.2f}", f"{change:.0e}" if tolerance else ""
            )
    console = Console(width=100)
    console.print(shown)
    console.print(f"A forward pass of {options.samples} images: {forward:.2f} s; {platform.machine()}, ", end="")
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    small, y = x[:, :, :64, :64], torch.arange(options.samples)
    for tolerance in (0.05, 0.01):
        start = time.perf_counter()
        report = lf.measure_flatness(net, [(small, y)], layers="conv1", tolerance=tolerance, progress=False)
        taken, error = time.perf_counter() - start, report.standard_errors["hessian_trace"] / report.hessian_trace
        console.print(f"First convolution, 64x64, tolerance {tolerance:g}: {taken:.1f} s, standard error {error:.3f}")


if __name__ == "__main__":
    main()
