"""The certified properties of layers and of a forward pass, as frozen values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_flatness.functional import LossDerivatives, weight_gram
from lightning_flatness.functional.symmetric import Folded
from lightning_flatness.layers.certificates import Known
from lightning_flatness.layers.certificates.affine import Inexact
from lightning_flatness.layers.certificates.layer import Kernel
from lightning_flatness.layers.certificates.tail import Tail, TailDerivatives
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.recording import LayerCall, Pass, Recorder
from lightning_flatness.layers.selection import Selection
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.results import LayerInfo

Calls = dict[str, tuple[LayerCall, ...]]


@dataclass(frozen=True)
class CertifiedLayer:
    """The properties of one layer that the batches so far have certified."""

    info: LayerInfo
    kernel: Known[Kernel]
    gram: Folded  # inner products of its filters, or their diagonal
    gram_norm: Tensor | None = None  # a bound of its spectral norm, if classes may be left out
    tail: Known[Tail] | None = None  # under the closed form
    inexact: Inexact | None = None  # under Gauss-Newton: why the number is not the Hessian's

    def with_deviation(self, *deviations: float) -> CertifiedLayer:
        """Return the same layer, with the largest of its deviation and these."""
        return replace(self, info=replace(self.info, deviation=max(self.info.deviation, *deviations)))

    def in_precision(self, precision: str, deviation: float) -> CertifiedLayer:
        """Return the same layer, measured in half precision, which changes its trace by ``deviation``."""
        return replace(self, info=replace(self.info, precision=precision, precision_deviation=deviation))


@dataclass(frozen=True)
class Certified:
    """What was certified of a model on the batches seen so far."""

    layers: Mapping[str, CertifiedLayer] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # layers of layers="all" that cannot be measured
    paths: Known[None] | None = None  # recognised by the uses of kernels
    affine: Known[None] | None = None  # recognised if no function of the graph can curve

    def without_operations(self) -> Certified:
        """Return the same certificates for a pass in another precision, whose operations are not known yet."""
        tails = {name: layer.tail and replace(layer.tail, fingerprint=None) for name, layer in self.layers.items()}
        return replace(self, layers={name: replace(self.layers[name], tail=tail) for name, tail in tails.items()})

    @property
    def infos(self) -> dict[str, LayerInfo]:
        """How every layer is measured."""
        return {name: layer.info for name, layer in self.layers.items()}


@dataclass(frozen=True)
class CertifiedPass:
    """A certified forward pass on some samples."""

    recorded: Pass
    loss: LossDerivatives
    calls: Calls
    tails: Mapping[str, TailDerivatives]  # of the layers under the closed form

    @property
    def others(self) -> Calls:
        """Calls of the layers under Gauss-Newton."""
        return {name: calls for name, calls in self.calls.items() if name not in self.tails}


@dataclass(frozen=True)
class Context:
    """The context of certificates: the layers to measure, the options, and a function that copies the model."""

    selection: Selection
    options: Options
    copy: Callable[[], ModelCopy]

    def recorder(self, copy: ModelCopy | None = None) -> Recorder:
        """Return a recorder for our forward pass on ``copy``, or, without a copy, for a forward pass of the user's."""
        watched = {name: copy.copy_of(p) if copy else p for name, p in self.selection.parameters.items()}
        return Recorder(self.selection.modules, self.selection.classifier, watched, live=copy is None)

    def gram(self, kernel: Tensor, groups: int) -> Folded:
        """Return the inner products of a layer's filters, or only their diagonal if the options need no more."""
        return Folded.of(weight_gram(kernel, groups, self.options.diagonal))
