"""Measure the flatness of layers over batches, and report it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.functional import filter_flatness, filter_traces, measures_of
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.layers.options import MEASURES, Options
from lightning_flatness.layers.sums import LayerSums, added
from lightning_flatness.measure.batches import paired_batches
from lightning_flatness.measure.metric import FlatnessMetric
from lightning_flatness.measure.progress import progress_bar
from lightning_flatness.measure.ranks import gather, own_rank
from lightning_flatness.model.call import as_call
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.model.isolation import untouched
from lightning_flatness.model.precision import runs_in_half
from lightning_flatness.model.whole import whole_model
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerInfo, merged


class Measurement:
    """One measurement in progress: an observer of the model, and the sums over samples for every layer.

    With ``sync``, all ranks report together.
    """

    def __init__(self, model: nn.Module, *, sync: bool = False, **options: Any) -> None:
        seed = options.get("seed", 0)
        self._diagonal = Options(**options).diagonal  # raises an error for invalid options
        # Every rank has its own seed: variances may be summed over ranks only if their probes are independent.
        self._observer = FlatnessObserver(model, **options | {"seed": seed + 1000 * own_rank(sync)})
        self._sync = sync
        self._model = model
        self._sums: dict[str, LayerSums] = {}

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """How each layer is measured, by layer name; empty before the first batch."""
        return self._observer.layers

    @property
    def left_out(self) -> Mapping[str, str]:
        """Reasons why layers cannot be measured, by layer name, for ``layers="all"``."""
        return self._observer.left_out

    def update(
        self, inputs: Any, targets: Tensor | None = None, advance: Callable[[float], None] | None = None
    ) -> None:
        """Add one batch. A batch without samples adds nothing."""
        self._add(self._observer.sums(inputs, targets, advance))

    def chosen(self, inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
        """Return the samples of a batch where the mask, ``(N,)``, is true (see ``FlatnessObserver``)."""
        return self._observer.chosen(inputs, targets, mask)

    def certify(self, inputs: Any, targets: Tensor | None, live: bool) -> None:
        """Add the batch that certifies the layers; if passes will be observed, see what half precision changes."""
        self.update(inputs, targets)
        if live and runs_in_half(self._model, as_call(inputs).precision):
            with untouched(self._model), torch.no_grad():  # training may have begun
                self.why_not_live(inputs, targets)

    def why_not_live(self, inputs: Any, targets: Tensor | None) -> str:
        """Return why the user's forward passes cannot be observed, or ``""`` if they can (see ``FlatnessObserver``)."""
        return self._observer.why_not_live(inputs, targets)

    def listen(self, inputs: Any = None) -> Listener:
        """Return a context that observes the user's call of the model (see ``FlatnessObserver``)."""
        return self._observer.listen(inputs)

    def update_observed(self, listener: Listener, targets: Tensor | None = None) -> None:
        """Add a batch on which the user's forward pass was observed. If this raises an error, nothing is added."""
        self._add(self._observer.observed_sums(listener, targets))

    @property
    def observes_half(self) -> bool:
        """Whether :meth:`why_not_live` has found that features are half precision."""
        return self._observer.observes_half

    def update_repeated(self, inputs: Any, targets: Tensor | None = None) -> None:
        """Add one batch in an observed pass of our own, which runs as the user's do. An error adds nothing."""
        self._add(self._observer.repeated_sums(inputs, targets))

    def _add(self, sums: dict[str, LayerSums]) -> None:
        different = sorted(sums.keys() ^ self._sums.keys())
        if sums and self._sums and different:
            raise BatchError(
                f"Layer '{different[0]}' is measured on some batches and not on others. Name the layers with layers=."
            )
        self._sums = self._sums | added(self._sums, sums)

    def _metric(self, info: LayerInfo) -> FlatnessMetric:
        # The metric is created only here, so that only the sums take memory while the model runs. It is on the model's
        # device, since a backend such as NCCL sums only tensors on its own kind of device over ranks.
        tensor = next(iter(self._model.parameters()), None)
        device = torch.device("cpu") if tensor is None else measuring_device(tensor.device)
        with torch.device("cpu"):  # whatever the default device is
            metric = FlatnessMetric(info.num_filters, info.groups, self._diagonal)
        metric = metric.to(device)
        if info.name in self._sums:
            metric.update(*self._sums[info.name].statistics())
        return metric

    def report(self) -> FlatnessReport:
        """Return the flatness over all batches so far; with ``sync``, over those of all ranks.

        With ``sync``, call it on every rank, also on a rank without batches. A label (a reason why a layer's numbers
        are not exact) that any rank has given is in the report of all ranks.
        """
        ranks = gather((self.layers, self.left_out), self._sync)
        found = [(layers, left_out) for layers, left_out in ranks if layers]
        if not found:
            raise BatchError("No sample was measured. Is the data set empty, or was the generator read before?")
        for layers, left_out in found:
            if layers.keys() != found[0][0].keys():
                different = sorted(layers.keys() ^ found[0][0].keys())
                reasons = {**left_out, **found[0][1]}
                raise BatchError(
                    f"Layer '{different[0]}' is measured on some ranks and not on others"
                    + (f" ({reasons[different[0]]})" if different[0] in reasons else "")
                    + ", since their first batches differ. Name the layers with layers=."
                )
        infos = {name: merged([layers[name] for layers, _ in found]) for name in found[0][0]}
        return FlatnessReport({name: self._layer(info) for name, info in infos.items()}, dict(found[0][1]))

    def _layer(self, info: LayerInfo) -> LayerFlatness:
        metric = self._metric(info)
        with metric.sync_context(should_sync=self._sync):
            means = metric.means()
            measures = {key: float(value) for key, value in measures_of(*means).items()}
            block_traces, gram = (mean.cpu() for mean in means)
            standard_errors = metric.standard_errors()
            num_samples = int(metric.num_samples)
        return LayerFlatness(
            block_traces=block_traces,
            filter_traces=filter_traces(block_traces),
            filter_flatness=filter_flatness(block_traces, gram),
            num_samples=num_samples,
            info=info,
            standard_errors={key: error for key, error in standard_errors.items() if key in measures},
            **{"relative_flatness": math.nan, **measures},
        )


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
) -> FlatnessReport:
    """Measure the flatness of convolutions and linear layers over all batches.

    Numbers are exact where that is certified; otherwise they are labelled. The model is measured in evaluation mode,
    and its weights, gradients, buffers, modes and random states are left as they were. Batches may have different
    sizes, and every sample has the same weight.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)``, e.g. a ``DataLoader``; or only inputs, if neither the loss's curvature nor
            the curvature of an activation depends on targets. Tensors are moved to the model's device.
        layers: ``"last"``, the last convolution before the classifier, or linear layer of many tokens or positions;
            ``"classifier"``; ``"all"``, every convolution and linear layer that can be measured (``report.left_out``
            names the others); or names or glob patterns.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` (with logits, for several binary labels) or ``"mse"``, all
            averaged as in torch; a loss module of torch with ``reduction="mean"``; or a function of ``(logits,
            targets)`` that returns the loss of every sample, ``(N,)``, whose mean is measured.
        label_smoothing: label smoothing of cross-entropy, as in ``torch.nn.CrossEntropyLoss``.
        class_weight: class weights ``(K,)`` of cross-entropy, as in ``torch.nn.CrossEntropyLoss(weight=...)``.
        ignore_index: target value that cross-entropy ignores.
        measures: the measures to compute. Without ``"relative_flatness"``, only the diagonals of the block traces are
            kept, which takes less time and memory.
        tolerance: relative standard error of trace and relative flatness for layers whose Gauss-Newton matrix is
            measured, with 128 classes or more: classes with little probability mass are sampled until it is reached.
            Such numbers are not called exact. With 0, or with ``strict``, all classes are computed.
        residual: ``"hutchinson"`` estimates, by random probes, the part of the Hessian that the Gauss-Newton matrix
            leaves out; ``layer.standard_errors`` has the standard errors.
        num_probes: number of these probes for every layer and batch.
        seed: seed of the probes.
        strict: raise an error instead of returning numbers that are not those of the Hessian.
        dtype: ``"float32"`` or ``"float64"``, the precision in which copies of weights and batches run; by default the
            model's own, but at least float32. Sums are always kept in float64.
        sync: sum over all ranks of a process group of ``torch.distributed``. Every rank then calls this function with
            its own batches, or none, and gets the flatness over the batches of all ranks. (If one rank raises an error,
            the others keep waiting, as with any collective.) Weights that ``fully_shard`` (FSDP2) has sharded are then
            measured in a whole copy, which every rank holds meanwhile. By default nothing communicates.
        progress: show a progress bar; by default only in a terminal.

    Returns:
        A :class:`~lightning_flatness.FlatnessReport`.

    Raises:
        FlatnessError: an option is invalid.
        LayerSelectionError: a layer does not exist, never runs, or does more than convolve; its weight is also used
            elsewhere; samples of a batch affect each other; or the forward is random.
        NotExactError: with ``strict``, a number would not be that of the Hessian.
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
    model = whole_model(model) if sync else model
    measurement = Measurement(
        model,
        sync=sync,
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
    with progress_bar(progress) as bar, paired_batches(model, batches) as pairs:
        task = bar.add_task("Flatness", total=len(batches) if isinstance(batches, Sized) else None)
        for index, (inputs, targets) in enumerate(pairs):

            def advance(part: float, index: int = index) -> None:
                bar.update(task, completed=index + part)

            measurement.update(inputs, targets, advance)
            bar.update(task, completed=index + 1)
    return measurement.report()
