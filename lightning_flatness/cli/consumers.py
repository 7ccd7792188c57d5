"""What is made of the samples that validation steps show: flatness, a mean loss, or a function of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.network import Network, Within
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.layers.options import Options
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.model.call import as_call
from lightning_flatness.model.logits import logits_of
from lightning_flatness.pages import DataHash
from lightning_flatness.results import FlatnessReport

Result = TypeVar("Result")


@dataclass(frozen=True)
class Found(Generic[Result]):
    """A result, a hash of the data that it is of, and the device that it was measured on."""

    result: Result
    data_hash: str
    device: str


class Flatness:
    """Measures flatness batch by batch, as :func:`~lightning_flatness.measure_flatness` does, with its ``options``."""

    def __init__(self, data: str, options: Mapping[str, Any]) -> None:
        self._data, self._options = data, options
        self._hash = DataHash()
        self._network: Network | None = None
        self._measurement: Measurement | None = None

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Measure the samples of a batch."""
        self._network = _same(self._network, network)
        if self._measurement is None:
            self._measurement = Measurement(network.module, prefix=network.prefix, per_sample=True, **self._options)
        self._hash.add(inputs, targets)
        self._measurement.update(inputs, targets)

    def result(self) -> Found[FlatnessReport]:
        """Return the report."""
        report = replace(_begun(self._measurement).report(), data=self._data)
        return Found(report, self._hash.text, _device(_begun(self._network).module))


class MeanLoss:
    """Adds up the losses of batches."""

    def __init__(self, loss: Any) -> None:
        self._loss = Options(loss=loss).loss_function
        self._sum = self._normalizer = 0.0

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Add the loss of a batch."""
        if targets is None:
            raise BatchError("A training batch has no targets, which its loss needs.")
        call = as_call(inputs)
        with torch.no_grad():
            logits = logits_of(network.module(*call.arguments, **call.keywords)).double()
        self._sum += float(self._loss.total(logits, targets))
        self._normalizer += self._loss(logits, targets).normalizer

    def result(self) -> float:
        """Return the mean loss."""
        return self._sum / self._normalizer


class Kept(Generic[Result]):
    """Keeps the samples of all batches, for a function that reads them many times."""

    def __init__(self, function: Callable[[nn.Module, Sequence[Any]], Result]) -> None:
        self._function = function
        self._hash = DataHash()
        self._network: Network | None = None
        self._batches: list[tuple[Any, Tensor | None]] = []

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Keep the samples of a batch."""
        self._network = _same(self._network, network)
        self._hash.add(inputs, targets)
        self._batches.append((as_call(inputs)._replace(precision=None).copied(), targets))

    def result(self) -> Found[Result]:
        """Return what the function makes of the network and the batches."""
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
