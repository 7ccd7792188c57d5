"""Measure the flatness of layers over batches, and report it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.layers.options import MEASURES
from lightning_flatness.measure.batches import as_batches, paired_batches
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.progress import length_of, progress_bar
from lightning_flatness.model.isolation import kept_switched
from lightning_flatness.model.whole import whole_model
from lightning_flatness.results import FlatnessReport


def measure_flatness(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: str | Sequence[str] = "last",
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    measures: Sequence[str] = MEASURES,
    tolerance: float = 0.01,
    residual: Literal["hutchinson"] | None = None,
    num_probes: int = 16,
    seed: int = 0,
    strict: bool = False,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    sync: bool = False,
    progress: bool | None = None,
    per_sample: bool = False,
) -> FlatnessReport:
    """Measure the flatness of convolutions and linear layers over all batches.

    Numbers are called exact if checks against autograd certify that they are those of the exact Hessian. Other numbers
    are labelled as not exact, with the reason. The model is measured in evaluation mode, and its weights, gradients,
    buffers, modes and random states stay as they were. Batches may have different sizes, and every sample has the same
    weight.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)``, e.g. a ``DataLoader``. Inputs alone are enough if the numbers do not
            depend on targets, as with cross-entropy without class weights in a ReLU network. Tensors are moved to the
            model's device.
        layers: ``"last"`` for the last convolution before the classifier, ``"classifier"``, ``"all"`` for every
            convolution and linear layer that can be measured, or names or glob patterns. A linear layer that is applied
            to many tokens or positions counts as a convolution. With ``"all"``, ``report.left_out`` names the layers
            that cannot be measured.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` (with logits, for several binary labels) or ``"mse"``, all
            averaged as in torch; a loss module of torch with ``reduction="mean"``; or a function of ``(logits,
            targets)`` that returns the loss of every sample, ``(N,)``. The mean of these losses is measured.
        label_smoothing: label smoothing of cross-entropy, as in ``torch.nn.CrossEntropyLoss``.
        class_weight: class weights ``(K,)`` of cross-entropy, as in ``torch.nn.CrossEntropyLoss(weight=...)``.
        ignore_index: target value that cross-entropy ignores.
        measures: the measures to compute: ``"hessian_trace"``, ``"relative_flatness"``, ``"neuronwise_flatness"``,
            ``"layerwise_flatness"``, ``"normalized_relative_flatness"``, ``"channelwise_flatness"``; by default all but
            the last. The first four are computed from the block traces, which are the traces of the Hessian's blocks
            for each pair of filters. If relative, normalised and channel-wise flatness are all left out, only the
            traces of the diagonal blocks are kept, which takes less time and memory.
        tolerance: largest relative standard error of trace and relative flatness. It applies to layers that are
            measured by the Gauss-Newton method, if there are 128 classes or more. Classes with little probability mass
            are then sampled until the error is below the tolerance, and the numbers are not called exact. With 0, or
            with ``strict``, all classes are computed.
        residual: with ``"hutchinson"``, random probes estimate the part of the Hessian that the Gauss-Newton matrix
            leaves out; ``layer.standard_errors`` has the standard errors.
        num_probes: number of these probes for every layer and batch.
        seed: seed of the probes.
        strict: raise an error instead of returning numbers that are not exact.
        dtype: precision in which the model runs, ``"float32"`` or ``"float64"``, on copies of its weights and of the
            batches. By default the model's own precision, but at least float32. Sums are always kept in float64.
        sync: sum over all ranks of a process group of ``torch.distributed``. Every rank then calls this function with
            its own batches, or with none, and gets the flatness over the batches of all ranks. If one rank raises an
            error, the others keep waiting, as with any collective. If ``fully_shard`` (FSDP2) has sharded the weights,
            every rank measures a copy of the model that holds all weights. The copy stays in memory until the end. By
            default nothing communicates.
        progress: show a progress bar; by default only in a terminal.
        per_sample: keep trace, relative flatness, loss and prediction of every sample, in ``samples`` of the report and
            of its layers.

    Returns:
        A :class:`~lightning_flatness.FlatnessReport`.

    Raises:
        FlatnessError: an option is invalid.
        LayerSelectionError: a layer does not exist, does not run on all samples, or does more than one convolution; a
            layer's weight is also used elsewhere; samples of a batch affect each other; or the forward pass is random.
        NotExactError: with ``strict``, a number would not be exact.
        BatchError: logits, targets or weights cannot be measured, there are no batches, or memory does not suffice.

    Source:
        Taleghani et al. 2026 (arXiv 2603.09016); Petzka et al. 2021 (arXiv 2001.00939), Definition 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> report = measure_flatness(net, [(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> report.layers["0"].exact, report.layers["0"].block_traces.shape
        (True, torch.Size([1, 4, 4]))
    """
    start = time.perf_counter()
    model = whole_model(model) if sync else model
    measurement = Measurement(
        model,
        sync=sync,
        per_sample=per_sample,
        layers=layers,
        loss=loss,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        measures=measures,
        tolerance=tolerance,
        residual=residual,
        num_probes=num_probes,
        seed=seed,
        strict=strict,
        dtype=dtype,
    )
    with kept_switched(model):
        with progress_bar(progress) as bar, paired_batches(model, batches) as pairs:
            task = bar.add_task("Flatness", total=length_of(as_batches(batches)))
            for index, (inputs, targets) in enumerate(pairs):

                def advance(part: float, index: int = index) -> None:
                    bar.update(task, completed=index + part)

                measurement.update(inputs, targets, advance)
                bar.update(task, completed=index + 1)
        report = measurement.report()
    return replace(report, seconds=time.perf_counter() - start)
