"""Compare the time of Hessian-vector products by this package, by plain autograd and, if installed, by curvlinops.

    python -m benchmarks.spectrum_cost [--samples 64] [--repeats 7] [--device cpu]

The network is a ResNet-20 for CIFAR in evaluation mode, with one batch of random data. Every repeat runs all tasks in
turn. The script prints medians, their ratios and all times. If curvlinops is installed (pip install
curvlinops-for-pytorch), its products also check the largest eigenvalue.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from benchmarks import networks
from lightning_flatness.functional import find_loss
from lightning_flatness.model.hessian import LossCurvature


def bare(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    parameters = list(net.parameters())

    def product(vector: Tensor) -> Tensor:
        pieces = [p.view_as(q) for p, q in zip(vector.split([q.numel() for q in parameters]), parameters, strict=True)]
        gradients = torch.autograd.grad(cross_entropy(net(x), y), parameters, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradients, parameters, pieces)])

    return product


def ours(net: nn.Module, x: Tensor, y: Tensor, matrix: str = "hessian") -> Callable[[Tensor], Tensor]:
    curvature = LossCurvature(net, find_loss("cross_entropy"), None, matrix)

    def product(vector: Tensor) -> Tensor:
        image = curvature.sums([(x, y)], vector).product
        assert image is not None
        return image.to(vector) / len(y)

    return product


def curvlinops(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    from curvlinops import HessianLinearOperator

    # The check for determinism is switched off because it is not part of a product.
    parameters = list(net.parameters())
    operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    return lambda vector: operator @ vector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"samples": 64, "repeats": 7, "depth": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.manual_seed(0)
    net = networks.resnet20(depth=options.depth).to(options.device)
    x = torch.randn(options.samples, 3, 32, 32, device=options.device)
    y = torch.randint(10, (options.samples,), device=options.device)
    tasks = {"bare autograd": bare(net, x, y), "lightning_flatness": ours(net, x, y)}
    tasks["lightning_flatness, Gauss-Newton"] = ours(net, x, y, "gauss_newton")
    if find_spec("curvlinops"):
        tasks["curvlinops"] = curvlinops(net, x, y)
    vector = torch.randn(sum(p.numel() for p in net.parameters()), device=options.device)
    raw: dict[str, list[float]] = {name: [] for name in tasks}
    results = {}
    for repeat in range(options.repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            results[name] = task(vector)
            if options.device == "cuda":
                torch.cuda.synchronize()
            raw[name] += [time.perf_counter() - start] if repeat else []  # the first is a warm-up
    console = Console(width=120)
    reference = results["bare autograd"]
    for name, times in raw.items():
        ratio = statistics.median(t / b for t, b in zip(times, raw["bare autograd"], strict=True))
        error = float((results[name] - reference).norm() / reference.norm())
        console.print(
            f"{name}: {statistics.median(times):.3f} s, {ratio:.2f} of bare, differs by {error:.0e}; ",
            ", ".join(f"{t:.3f}" for t in times),
        )
    result = lf.hessian_spectrum(net, [(x, y)], top_k=1, num_steps=1, num_probes=5, tolerance=1e-4, progress=False)
    console.print(f"λmax {float(result.eigenvalues):.6g}, trace {result.trace:.5g} ± {result.trace_stderr:.2g}")
    if "curvlinops" in tasks:
        v = result.eigenvectors[0].to(options.device)
        image = tasks["curvlinops"](v)
        console.print(f"‖Hv - λv‖ of that by curvlinops: {float((image - float(result.eigenvalues) * v).norm()):.2g}")


if __name__ == "__main__":
    main()
