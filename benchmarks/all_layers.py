"""Measure all layers of a ResNet-20; compare with BackPACK, with plain backward passes, and with a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.rows import Row
from benchmarks.timing import interleaved, peaks_apart

SAMPLES, CLASSES = 64, 10


def rows() -> list[Row]:
    what = f"all layers of a ResNet-20, {SAMPLES} images, {CLASSES} classes"
    return [
        Row("all_layers", f"{what}: time", "BackPACK, DiagGGNExact (traces only)", "faster", 10),
        Row("all_layers", f"{what}: time", f"{CLASSES} bare backward passes", "times", 1.5),
        Row("all_layers", f"{what}: peak memory", "a training step", "times"),
    ]


def flatness(net: nn.Module, x: Tensor, y: Tensor) -> float:
    report = lf.measure_flatness(net, [(x, y)], layers="all", tolerance=0, progress=False)
    assert report.exact
    return report.hessian_trace


def diagonal(net: nn.Module, x: Tensor, y: Tensor) -> float:
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    with backpack(DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(net(x), y).backward()
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    trace = sum(float(layer.weight.diag_ggn_exact.double().sum()) for layer in layers)
    net.zero_grad()
    return trace


def extended(net: nn.Module) -> nn.Module:
    from backpack import extend

    return extend(net, use_converter=True).eval()


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


def prepared(name: str, net: nn.Module) -> Callable[[Tensor, Tensor], float | None]:
    net = deepcopy(net)
    if name == "training":
        net.train()
    functions = {"flatness": flatness, "backpack": diagonal, "backward": backward, "training": training}
    return partial(functions[name], extended(net) if name == "backpack" else net)


def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.resnet20(CLASSES)


def task_apart(name: str) -> tuple[Callable[[], object], ...]:
    task, (x, y) = prepared(name, network()), networks.images(SAMPLES)
    return partial(task, x[:2], y[:2]), partial(task, x, y)


def measure(quick: bool) -> list[Row]:
    net, (x, y) = network(), networks.images(SAMPLES)
    values: dict[str, float | None] = {}
    failed = ""
    prepared_tasks = {name: prepared(name, net) for name in ("flatness", "backward")}
    try:
        peer = prepared("backpack", net)
        peer(x[:2], y[:2])
        prepared_tasks["backpack"] = peer
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    tasks = {
        name: lambda name=name, task=task: values.update({name: task(x, y)}) for name, task in prepared_tasks.items()
    }
    times = interleaved(tasks, 1 if quick else 5)
    beside_peer, bare, memory = rows()
    if failed:
        beside_peer = beside_peer.failed(failed)
    else:
        apart = abs(values["flatness"] / values["backpack"] - 1)
        if apart > 1e-3:
            raise RuntimeError(f"not the same number: {values}")
        seconds = f"{times.median('flatness'):.2f} and {times.median('backpack'):.2f} s"
        note = f"{seconds}; sums of traces {apart:.0e} apart; {times.spread('backpack', 'flatness')}"
        beside_peer = beside_peer.measured(times.ratio("backpack", "flatness"), note, times.wall)
    bare = bare.measured(
        times.ratio("flatness", "backward"),
        f"{times.median('backward'):.2f} s of passes to all outputs; {times.spread('flatness', 'backward')}",
    )
    repeats = 1 if quick else 3
    peaks = {n: peaks_apart("benchmarks.all_layers:task_apart", repeats, name=n) for n in ("flatness", "training")}
    a, b = (statistics.median(peaks[name]) for name in ("flatness", "training"))
    raw = {f"{name}, MB": [peak / 1e6 for peak in peaks[name]] for name in peaks}
    return [beside_peer, bare, memory.measured(a / b, f"{a / 1e6:.0f} and {b / 1e6:.0f} MB", raw)]
