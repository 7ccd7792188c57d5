"""From batches to a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_flatness.capture import FlatnessObserver, random_states_kept
from lightning_flatness.errors import BatchError
from lightning_flatness.functional import filter_flatness, filter_traces
from lightning_flatness.metrics.flatness_metric import FlatnessMetric
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerInfo


class Measurement:
    """One measurement in progress: an observer of the model and a metric for every layer.

    Args:
        model: see :class:`~lightning_flatness.FlatnessObserver`; so are ``layers`` and ``loss``.
        layers: which layers.
        loss: which loss.
        strict: refuse layers whose number would not be exact.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> measurement = Measurement(net)
        >>> measurement.update(torch.randn(5, 1, 8, 8))
        >>> measurement.report().num_samples
        5
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "last",
        loss: str = "cross_entropy",
        strict: bool = False,
    ) -> None:
        self._observer = FlatnessObserver(model, layers, loss, strict)
        self._metrics: dict[str, FlatnessMetric] = {}

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """How every layer is measured; empty before the first batch."""
        return self._observer.layers

    def update(self, inputs: Any, targets: Tensor | None = None) -> None:
        """Add one batch; one without samples adds nothing."""
        sizes: list[int] = []
        apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.ndim else 1))
        if sizes and not max(sizes):
            return
        for name, statistics in self._observer(inputs, targets).items():
            if name not in self._metrics:
                info = self._observer.layers[name]
                metric = FlatnessMetric(info.num_filters, info.groups)
                self._metrics[name] = metric.to(statistics.block_traces.device)
            self._metrics[name].update(*statistics)

    def report(self) -> FlatnessReport:
        """The flatness over all batches so far, of all ranks. Call it on every rank or on none.

        Raises:
            BatchError: there was no batch.
        """
        if not self._metrics:
            raise BatchError("No sample was measured, so there is no flatness. Is the data set empty?")
        return FlatnessReport({name: self._layer(name, metric) for name, metric in self._metrics.items()})

    def _layer(self, name: str, metric: FlatnessMetric) -> LayerFlatness:
        measures = {key: float(value) for key, value in metric.compute().items()}
        with metric.sync_context():
            block_traces, gram = (mean.cpu() for mean in metric.means())
            num_samples = int(metric.num_samples)
        return LayerFlatness(
            block_traces=block_traces,
            filter_traces=filter_traces(block_traces),
            filter_flatness=filter_flatness(block_traces, gram),
            num_samples=num_samples,
            info=self._observer.layers[name],
            **measures,
        )


def measure_flatness(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: str | Sequence[str] = "last",
    loss: str = "cross_entropy",
    strict: bool = False,
) -> FlatnessReport:
    """Flatness of convolutions and linear layers over all batches: exact where that is certified, else labelled.

    The model is measured in evaluation mode, whatever mode it is in, and left as it was: weights, gradients, buffers,
    modes, random states. Batches may have different sizes; every sample counts the same.

    Args:
        model: any module that returns logits ``(N, K)``.
        batches: pairs ``(inputs, targets)``, e.g. a ``DataLoader``; or inputs alone, where all activations between the
            layer and the classifier are piecewise linear. Tensors are moved to the model's device.
        layers: ``"last"``, the last convolution before the classifier; ``"classifier"``; ``"all"``, every convolution
            and linear layer; or names or glob patterns.
        loss: ``"cross_entropy"``.
        strict: raise an error instead of giving the Gauss-Newton part where that is not the whole Hessian.

    Returns:
        A :class:`~lightning_flatness.FlatnessReport`.

    Raises:
        LayerSelectionError: no such layer, it never runs, does more than convolve, its weight is used elsewhere too,
            samples mix, or the forward is random.
        NotExactError: with ``strict``, a number would not be the Hessian's.
        BatchError: logits, targets or weights that cannot be measured; no batches.

    Source:
        Taleghani et al. 2026 (arXiv 2603.09016); Petzka et al. 2021 (arXiv 2001.00939), Definition 3.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> report = measure_flatness(net, [(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> report.layers["0"].exact, report.layers["0"].block_traces.shape
        (True, torch.Size([1, 4, 4]))
    """
    measurement = Measurement(model, layers, loss, strict)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    with random_states_kept(model):  # a DataLoader draws its seed when it is iterated
        for batch in batches:
            inputs, targets = split_batch(batch)
            inputs = apply_to_collection(inputs, Tensor, lambda tensor: tensor.to(device))
            measurement.update(inputs, None if targets is None else targets.to(device))
    return measurement.report()


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """``(inputs, targets)`` of a batch: a pair as it is, a lone tensor as inputs without targets.

    Raises:
        BatchError: anything else.

    Example:
        >>> inputs, targets = split_batch(torch.zeros(4, 1))
        >>> targets is None
        True
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and (batch[1] is None or isinstance(batch[1], Tensor)):
        return batch[0], batch[1]
    raise BatchError(
        f"A batch is a {type(batch).__name__}"
        + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        + "; expected (inputs, targets) with a tensor of targets, or a tensor of inputs. Reshape it, or give the "
        "callback batch_fn=, a function from a batch to (inputs, targets)."
    )
