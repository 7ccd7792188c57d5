"""Measure relative flatness of the classifier; compare with the full Hessian by autograd (``torch.func.hessian``).

The code of Petzka et al. 2021 computes the full Hessian, too: all second derivatives, and then the traces of blocks.
Most rows compare the two formulas alone, which start from the features that the classifier reads and certify nothing.
The last row compares a whole measurement, which starts from images and includes the certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from benchmarks import machine, networks
from benchmarks.rows import Row
from benchmarks.timing import interleaved
from lightning_flatness.functional import CrossEntropy, classifier_block_traces, relative_flatness, weight_gram

SAMPLES = 64
CALLS = 100  # calls of the formula that are timed together, because one call takes less than a millisecond
SIZES = {
    (512, 10): "ResNet-18, 10 classes",
    (64, 100): "ResNet-20, 100 classes",
    (512, 40): "ResNet-18, 40 classes",
}


def rows() -> list[Row]:
    against = "its full Hessian, torch.func.hessian"
    from_features_only = [
        Row(
            "classifier",
            f"relative flatness of the classifier, {name}, {SAMPLES} images, from features",
            against,
            "faster",
            1000,
        )
        for name in SIZES.values()
    ]
    whole = f"relative flatness of the classifier, ResNet-18, 10 classes, {SAMPLES} images, from images"
    return [
        *from_features_only,
        Row("classifier", whole, against, "faster"),
    ]  # the last row has no goal, because on both sides the forward pass takes most of the time


def from_hessian(net: nn.Module, name: str, batch: networks.Batch) -> float:
    """Compute relative flatness, sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'}), from all entries of the Hessian ``H``."""
    x, y = batch
    weight = net.get_parameter(name).detach()  # the row w_s belongs to neuron s
    full = hessian(lambda w: cross_entropy(functional_call(net, {name: w}, (x,)), y))(weight)
    traces = torch.einsum("sdtd->st", full)
    return float((traces.detach() * (weight @ weight.T)).sum())


def from_features(classifier: nn.Linear, batch: networks.Batch) -> float:
    """Compute relative flatness by :func:`classifier_block_traces`, from the features that the classifier reads."""
    features, targets = batch
    loss = CrossEntropy()(classifier(features).detach(), targets)
    traces = classifier_block_traces(features, loss.curvature) / loss.normalizer
    return float(relative_flatness(traces, weight_gram(classifier.weight)))


def certified(net: nn.Module, batch: networks.Batch) -> float:
    return lf.measure_flatness(net, [batch], layers="classifier", progress=False, tolerance=0).relative_flatness


def stops_fitting() -> str:
    """Describe the largest classifier whose Hessian fits into the memory of this machine."""
    there = machine.memory()
    weights = int((there / 4) ** 0.5)
    return (
        f"one float32 Hessian fills the {there / 2**30:.0f} GiB of this machine at {weights:,} weights: "
        f"{weights // 512} classes of 512 features (computed); 1000 x 2048 takes {4 * 2_048_000**2 / 1e12:.0f} TB"
    )


def measure(quick: bool) -> list[Row]:
    results, expected = [], rows()
    repeats = 1 if quick else 5
    for (width, classes), row in zip(SIZES, expected, strict=False):
        torch.manual_seed(0)
        head = nn.Linear(width, classes).eval()
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(SAMPLES, width, generator=generator).relu()
        batch = features, torch.randint(classes, (SAMPLES,), generator=generator)
        results.append(compared(row, from_features, head, "weight", batch, repeats, CALLS))
    torch.manual_seed(0)
    net = networks.resnet18()
    batch = networks.images(SAMPLES)
    return [*results, compared(expected[-1], certified, net, "fc.weight", batch, repeats)]


def compared(
    row: Row,
    ours: Callable[[Any, networks.Batch], float],
    net: nn.Module,
    name: str,
    batch: networks.Batch,
    repeats: int,
    calls: int = 1,
) -> Row:
    values: dict[str, float] = {}

    def task(kind: str) -> None:
        for _ in range(calls if kind == "ours" else 1):
            values[kind] = ours(net, batch) if kind == "ours" else from_hessian(net, name, batch)

    try:
        times = interleaved({kind: partial(task, kind) for kind in ("ours", "hessian")}, repeats)
    except RuntimeError as error:  # out of memory
        return row.failed(f"{error}; {stops_fitting()}")
    apart = abs(values["ours"] / values["hessian"] - 1)
    if apart > 1e-3:
        raise RuntimeError(f"not the same number: {values}")
    note = (
        f"{1e3 * times.median('ours') / calls:.3g} ms{f' (mean of {calls} calls)' if calls > 1 else ''} and "
        f"{times.median('hessian'):.2f} s, the numbers {apart:.0e} apart; "
        f"{net.get_parameter(name).numel():,} weights; {stops_fitting()}"
    )
    raw = {f"ours, {calls} calls" if calls > 1 else "ours": times.wall["ours"], "hessian": times.wall["hessian"]}
    return row.measured(calls * times.ratio("hessian", "ours"), note, raw)
