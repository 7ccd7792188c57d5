"""From batches to a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
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
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerInfo, merged


class Measurement:
    """One measurement in progress: an observer of the model and sums for every layer."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        seed = options.get("seed", 0)
        self._diagonal = Options(**options).diagonal  # refuses options that cannot be
        # Variances add up, since probes of ranks are independent.
        self._observer = FlatnessObserver(model, **options | {"seed": seed + 1000 * own_rank()})
        self._model = model
        self._sums: dict[str, LayerSums] = {}

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """How every layer is measured; empty before the first batch."""
        return self._observer.layers

    @property
    def left_out(self) -> Mapping[str, str]:
        """Layers of ``layers="all"`` that cannot be measured, and why."""
        return self._observer.left_out

    def update(
        self, inputs: Any, targets: Tensor | None = None, advance: Callable[[float], None] | None = None
    ) -> None:
        """Add one batch; one without samples adds nothing."""
        self._add(self._observer.sums(inputs, targets, advance))

    def why_not_live(
        self, inputs: Any, targets: Tensor | None, forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> str:
        """Why the user's forward passes cannot be observed; empty if they can (see ``FlatnessObserver``)."""
        return self._observer.why_not_live(inputs, targets, forward)

    def listen(self, inputs: Any) -> Listener:
        """Observe the user's forward pass on these inputs, once :meth:`why_not_live` has returned nothing."""
        return self._observer.listen(inputs)

    def update_observed(self, listener: Listener, targets: Tensor | None = None) -> None:
        """Add a batch on which the user's forward pass was observed; nothing, if that raises an error."""
        self._add(self._observer.observed_sums(listener, targets))

    def _add(self, sums: dict[str, LayerSums]) -> None:
        different = sorted(sums.keys() ^ self._sums.keys())
        if sums and self._sums and different:
            raise BatchError(
                f"Layer '{different[0]}' is measured on some batches and not on others. Name the layers with layers=."
            )
        self._sums = self._sums | added(self._sums, sums)

    def _metric(self, info: LayerInfo) -> FlatnessMetric:
        # Made when asked for, so that while a model runs there is no more than the sums. It is on the model's device,
        # where a backend of torch.distributed that takes no other sums it over ranks.
        tensor = next(iter(self._model.parameters()), None)
        device = torch.device("cpu") if tensor is None else measuring_device(tensor.device)
        with torch.device("cpu"):  # whatever the default device is
            metric = FlatnessMetric(info.num_filters, info.groups, self._diagonal)
        metric = metric.to(device)
        if info.name in self._sums:
            metric.update(*self._sums[info.name].statistics())
        return metric

    def report(self) -> FlatnessReport:
        """The flatness over all batches so far, of all ranks; call it on every rank, also on one that saw no batch.

        What one rank has labelled is labelled.
        """
        found = [(layers, left_out) for layers, left_out in gather((self.layers, self.left_out)) if layers]
        if not found:
            raise BatchError("No sample was measured, so there is no flatness. Is the data set empty?")
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
        with metric.sync_context():
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
    progress: bool | None = None,
) -> FlatnessReport:
    """Flatness of convolutions and linear layers over all batches: exact where that is certified, else labelled.

    The model is measured in evaluation mode, whatever mode it is in, and left as it was: weights, gradients, buffers,
    modes, random states. Batches may have different sizes; every sample counts the same. In a process group of
    ``torch.distributed`` every rank gives its own batches, or none, and gets the flatness over all: call it on every
    rank or on none. (An error on one rank leaves the others waiting, as with any collective.)

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)``, e.g. a ``DataLoader``; or inputs alone, where neither the loss's curvature
            nor a curved activation needs targets. Tensors are moved to the model's device.
        layers: ``"last"``, the last convolution before the classifier; ``"classifier"``; ``"all"``, every convolution
            and linear layer that can be measured (``report.left_out`` names the others); or names or glob patterns.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` (several labels, each yes or no; with logits) or
            ``"mse"``, all averaged as in torch; a loss module of torch with a mean; or a function from ``(logits,
            targets)`` to the loss of every sample, ``(N,)``, of which the mean is measured.
        label_smoothing: of cross-entropy; this and the next two as in ``torch.nn.CrossEntropyLoss``.
        class_weight: of cross-entropy, ``(K,)``.
        ignore_index: of cross-entropy.
        measures: without ``"relative_flatness"`` only diagonals of the block traces are kept, which takes less time and
            memory.
        tolerance: with 128 classes or more, layers under Gauss-Newton sample the classes that carry little mass, until
            trace and relative flatness have this relative standard error; such numbers are not called exact. 0, or
            ``strict``, takes every class.
        residual: ``"hutchinson"`` estimates the part of the Hessian that Gauss-Newton leaves out, by random probes;
            ``layer.standard_errors`` tells how well.
        num_probes: for that, probes for every layer and batch.
        seed: of the probes.
        strict: raise an error instead of giving a number that is not the Hessian's.
        dtype: ``"float32"`` or ``"float64"``, to run copies of weights and batches in; by default the model's own, at
            least float32. Sums are kept in float64 always.
        progress: show a progress bar; by default in a terminal.

    Returns:
        A :class:`~lightning_flatness.FlatnessReport`.

    Raises:
        FlatnessError: options that cannot be.
        LayerSelectionError: no such layer, it never runs, does more than convolve, its weight is used elsewhere too,
            samples mix, or the forward is random.
        NotExactError: with ``strict``, a number would not be the Hessian's.
        BatchError: logits, targets or weights that cannot be measured; no batches; no memory.

    Source:
        Taleghani et al. 2026 (arXiv 2603.09016); Petzka et al. 2021 (arXiv 2001.00939), Definition 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> report = measure_flatness(net, [(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> report.layers["0"].exact, report.layers["0"].block_traces.shape
        (True, torch.Size([1, 4, 4]))
    """
    measurement = Measurement(
        model,
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
