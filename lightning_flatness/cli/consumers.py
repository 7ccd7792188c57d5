"""Three consumers, i.e. objects that get the inputs and targets of validation steps and compute a result.

:class:`Flatness` computes a flatness report and :class:`MeanLoss` a mean loss. :class:`Kept` collects all samples and
calls a function with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.network import Network, Within
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.layers.options import Options
from lightning_flatness.measure.batches import NO_LOSS
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.model.call import as_call
from lightning_flatness.model.logits import finding_what_is_not_finite, logits_of
from lightning_flatness.pages import DataHash
from lightning_flatness.results import FlatnessReport

Result = TypeVar("Result")


@dataclass(frozen=True)
class Found(Generic[Result]):
    """A result of any type, with a hash of the measured data and the name of the device."""

    result: Result
    data_hash: str
    device: str


class Flatness:
    """Measures flatness batch by batch; the ``options`` are those of :func:`~lightning_flatness.measure_flatness`.

    ``data`` is the name of the split, ``"val"`` or ``"train"``, for the report.
    """

    def __init__(self, data: str, options: Mapping[str, Any]) -> None:
        self._data, self._options = data, options
        self._hash = DataHash()
        self._network: Network | None = None
        self._measurement: Measurement | None = None

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Measure the network on one batch."""
        self._network = _same(self._network, network)
        if self._measurement is None:
            self._measurement = Measurement(network.module, prefix=network.prefix, per_sample=True, **self._options)
        self._hash.add(inputs, targets)
        self._measurement.update(inputs, targets)

    def result(self) -> Found[FlatnessReport]:
        """Return the flatness report on all batches, with a hash of the data and the name of the device."""
        report = replace(_begun(self._measurement).report(), data=self._data)
        return Found(report, self._hash.text, _device(_begun(self._network).module))


class MeanLoss:
    """Computes the mean loss over all batches."""

    def __init__(self, loss: Any) -> None:
        self._loss = Options(loss=loss).loss_function
        self._sum = self._normalizer = 0.0

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Run the network on a batch and add the loss of the batch to the sum."""
        if targets is None:
            raise BatchError(
                "A training batch has no targets, so its loss cannot be computed. Give --no-train-loss to compare the "
                "networks without the training loss."
            )
        call = as_call(inputs)
        with torch.no_grad(), finding_what_is_not_finite(network.module, call, network.prefix):
            logits = logits_of(network.module(*call.arguments, **call.keywords)).double()
        self._sum += float(self._loss.total(logits, targets))
        self._normalizer += self._loss(logits, targets).normalizer

    def result(self) -> float:
        """Return the mean loss over all batches."""
        if not self._normalizer > 0:
            raise BatchError(NO_LOSS)
        return self._sum / self._normalizer


class Kept(Generic[Result]):
    """Keeps copies of all batches, and calls ``function`` with the network and the batches at the end."""

    def __init__(self, function: Callable[[nn.Module, Sequence[Any]], Result]) -> None:
        self._function = function
        self._hash = DataHash()
        self._network: Network | None = None
        self._batches: list[tuple[Any, Tensor | None]] = []

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Keep a copy of a batch."""
        self._network = _same(self._network, network)
        self._hash.add(inputs, targets)
        self._batches.append((as_call(inputs)._replace(precision=None, answer=None).copied(), targets))

    def result(self) -> Found[Result]:
        """Call ``function``, and return its result with a hash of the data and the name of the device."""
        network = _begun(self._network)
        model = Within(network.module, network.prefix) if network.prefix else network.module
        return Found(self._function(model, self._batches), self._hash.text, _device(model))


def _same(before: Network | None, network: Network) -> Network:
    if before is not None and before.module is not network.module:
        raise FlatnessError("Validation steps call different networks; name one with --network NAME.")
    return network


def _begun(value: Result | None) -> Result:
    if value is None:
        raise BatchError("No sample was measured. Is the data set empty?")
    return value


def _device(model: nn.Module) -> str:
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
