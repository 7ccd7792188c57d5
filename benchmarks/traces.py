"""Measure the trace of the last convolution's Hessian; compare with the estimates of curvlinops and PyHessian.

The network is a ResNet-20, trained for a few steps on scikit-learn's digits. With random weights, all samples would be
alike, and the rank of the Hessian would be so low that estimates are easy. Batch, precision and loss are the same for
all packages.

- curvlinops: ``xtrace(HessianLinearOperator(model, loss, [weight], [batch]), num_matvecs)``. The number of products is
  doubled until the error is below 1e-5 or the time is up. If the time is up, the row says so, and the time is
  extrapolated from the measured cost of a product to twice as many products as the rank of the Hessian.
- PyHessian: ``hessian(model, loss, data=batch, cuda=False).trace()``. Only the layer's weight requires gradients, so
  that PyHessian uses no other parameters. The number of probes follows from the measured variance.

This package is measured in two ways: alone, with its own forward pass and all certificates; and as the time that
observing adds to each batch of a validation epoch, including the trial at the start of the epoch.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import nn

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.observed import forward, observed
from benchmarks.rows import Row
from benchmarks.timing import interleaved, once

SAMPLES = 64
STEPS = 20
WANTED = 1e-5
SECONDS = 40.0  # limit for curvlinops
PROBES = 200
BATCHES = 32  # in the validation epoch


def rows() -> list[Row]:
    trace = f"Hessian trace of the last convolution, ResNet-20 on digits, {SAMPLES} images"
    return [
        Row("traces", f"{trace}, to 1e-5", "curvlinops, XTrace to 1e-5", "faster", 300),
        Row("traces", f"{trace}, to 1e-5: added to a validation", "curvlinops, XTrace to 1e-5", "faster", 300),
        Row("traces", f"{trace}, to 1 %", "PyHessian, Hutchinson to a standard error of 1 %", "faster", 10_000),
        Row("traces", f"{trace}, to 1 %: added to a validation", "PyHessian, the probes alone", "faster", 10_000),
    ]


@contextmanager
def only(net: nn.Module, weight: nn.Parameter):
    """In a ``with`` block, let only the parameter ``weight`` require a gradient."""
    required = {parameter: parameter.requires_grad for parameter in net.parameters()}
    for parameter in required:
        parameter.requires_grad_(parameter is weight)
    try:
        yield
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
            parameter.grad = None


def prepared(steps: int) -> tuple[nn.Module, networks.Batch]:
    torch.manual_seed(0)
    data = networks.digits()
    net = networks.trained(networks.resnet20(), data, steps)
    return net, (data[0][:SAMPLES], data[1][:SAMPLES])


def ours(net: nn.Module, batch: networks.Batch) -> lf.FlatnessReport:
    return lf.measure_flatness(net, [batch], measures=("hessian_trace",), progress=False)


def epoch(net: nn.Module, batch: networks.Batch, batches: int) -> None:
    """Run and observe the forward passes of a validation epoch."""
    step = observed(net, batch, measures=("hessian_trace",))
    for _ in range(batches):
        step()


def with_curvlinops(
    net: nn.Module, weight: nn.Parameter, batch: networks.Batch, expected: float, limit: float
) -> tuple[float, str, list[float]]:
    """Return the seconds that XTrace needs, a note on how they were measured, and all measured times."""
    from curvlinops import HessianLinearOperator
    from curvlinops.trace.epperly2024xtrace import xtrace

    spent, tried, raw = 0.0, [], []
    rank = len(batch[0]) * (net(batch[0][:1]).shape[1] - 1)  # samples times (classes - 1), in a ReLU network
    torch.manual_seed(1)
    xtrace(operator := HessianLinearOperator(net, nn.CrossEntropyLoss(), [weight], [batch]), 4)  # a warm-up
    products = 16
    while True:
        traces: list[float] = []
        seconds, _ = once(lambda n=products, traces=traces: traces.append(float(xtrace(operator, n))))
        error = abs(traces[0] / expected - 1)
        spent += seconds
        raw.append(seconds)
        tried.append(f"{products}: {error:.0e}")
        shown = "errors by products " + ", ".join(tried)
        if error <= WANTED:
            return seconds, f"{products} products in {seconds:.2f} s; {shown}", raw
        if products >= 2 * rank or spent + 2.5 * seconds > limit:
            seconds *= max(1.0, 2 * rank / products)
            return seconds, f"extrapolated to {2 * rank} products (rank {rank}), {seconds:.0f} s; {shown}", raw
        products *= 2


def with_pyhessian(
    net: nn.Module, batch: networks.Batch, expected: float, probes: int
) -> tuple[float, float, str, list[float]]:
    """Return the seconds that PyHessian needs for a standard error of 1 %.

    Returns:
        The seconds with the first backward pass, the seconds of the probes alone, a note on how they were measured, and
        all measured times.
    """
    from pyhessian import hessian

    made: list = []

    def build() -> None:
        net.zero_grad()  # hessian() adds to existing gradients
        made.append(hessian(net, nn.CrossEntropyLoss(), data=batch, cuda=False))

    once(build)
    start, _ = once(build)
    torch.manual_seed(1)
    values: list[float] = []
    # tol=0 uses every probe. PyHessian's stopping rule compares two successive means, which says nothing of the error.
    seconds, _ = once(lambda: values.extend(made[-1].trace(maxIter=probes, tol=0)))
    estimates = torch.tensor(values, dtype=torch.float64)
    mean, deviation = float(estimates.mean()), float(estimates.std())
    apart = abs(mean - expected) / (deviation / math.sqrt(len(values)))
    needed = max(2.0, (deviation / expected / 0.01) ** 2)
    total = seconds / len(values) * needed
    note = (
        f"extrapolated to {needed:,.0f} probes from {len(values)} of {1e3 * seconds / len(values):.1f} ms with a "
        f"standard deviation of {deviation / expected:.2f}: {start + total:.1f} s; mean of these {apart:.1f} standard "
        "errors from ours"
    )
    if apart > 4:
        raise RuntimeError(f"PyHessian does not give the same number: {note}")
    return start + total, total, note, [start, seconds]


def measure(quick: bool) -> list[Row]:
    net, batch = prepared(5 if quick else STEPS)
    report = ours(net, batch)
    (name,) = report.layers
    weight = net.get_submodule(name).weight
    batches = 4 if quick else BATCHES
    tasks = {
        "ours": lambda: ours(net, batch),
        "observed": lambda: epoch(net, batch, batches),
        "validation": lambda: [forward(net, batch[0]) for _ in range(batches)],
    }
    times = interleaved(tasks, 2 if quick else 7)
    plain = times.median("validation") / batches
    added = times.median("observed") / batches - plain
    head = f"ours {1e3 * times.median('ours'):.0f} ms, a forward pass {1e3 * plain:.0f} ms; "
    epochs = f"{1e3 * added:.1f} ms a batch are added to an epoch of {batches}"
    raw_epochs = {name: times.wall[name] for name in ("observed", "validation")}
    results, expected = [], report.hessian_trace
    whole, in_epoch, probing, probing_in_epoch = rows()
    with only(net, weight):
        check = exact_trace(net, weight, batch)
        head += f"{abs(expected / check - 1):.0e} from autograd in float64; "
        try:
            seconds, note, raw = with_curvlinops(net, weight, batch, check, 5 if quick else SECONDS)
            raws, is_far = {"ours": times.wall["ours"], "curvlinops": raw}, note.startswith("extrapolated")
            results += [
                whole.measured(seconds / times.median("ours"), head + note, raws, is_far),
                in_epoch.measured(seconds / added, epochs, raw_epochs, is_far),
            ]
        except Exception as error:
            results += [row.failed(f"{type(error).__name__}: {error}") for row in (whole, in_epoch)]
        try:
            seconds, probes, note, raw = with_pyhessian(net, batch, check, 20 if quick else PROBES)
            raws = {"ours": times.wall["ours"], "PyHessian, first pass and probes": raw}
            results += [
                probing.measured(seconds / times.median("ours"), head + note, raws, True),
                probing_in_epoch.measured(probes / added, epochs, extrapolated=True),
            ]
        except Exception as error:
            results += [row.failed(f"{type(error).__name__}: {error}") for row in (probing, probing_in_epoch)]
    return results


def exact_trace(net: nn.Module, weight: nn.Parameter, batch: networks.Batch) -> float:
    """Compute the trace of the Hessian by autograd in float64, without this package.

    Requires: the logits are affine in the weight. Then the trace is the mean over samples of
    ``sum_{k,l} Λ[k,l] <J_k, J_l>``. ``J_k`` is the gradient of logit ``k`` with respect to the weight, and ``Λ`` the
    second derivative of the loss at the logits. This takes one backward pass for every sample and class.
    """
    from copy import deepcopy

    double = deepcopy(net).double()
    copied = dict(zip(net.parameters(), double.parameters(), strict=True))[weight]
    for parameter in double.parameters():
        parameter.requires_grad_(parameter is copied)
    total = 0.0
    for x in batch[0].double():
        row = double(x[None])[0]
        jacobian = torch.stack([torch.autograd.grad(entry, copied, retain_graph=True)[0].flatten() for entry in row])
        pi = row.detach().softmax(0)
        total += float(((pi.diag() - pi[:, None] * pi) * (jacobian @ jacobian.T)).sum())
    return total / len(batch[0])
