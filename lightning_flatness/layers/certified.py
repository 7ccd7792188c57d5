"""What is known of layers and of a forward pass, as frozen values."""

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
    """What is known of one layer from the batches so far."""

    info: LayerInfo
    kernel: Known[Kernel]
    gram: Folded  # inner products of its filters, or their diagonal
    gram_norm: Tensor | None = None  # a bound of its spectral norm, where classes may be left out
    tail: Known[Tail] | None = None  # under the closed form
    inexact: Inexact | None = None  # under Gauss-Newton: why the number is not the Hessian's

    def with_deviation(self, *deviations: float) -> CertifiedLayer:
        """The same, with the largest of these deviations if it is larger than the one known."""
        return replace(self, info=replace(self.info, deviation=max(self.info.deviation, *deviations)))


@dataclass(frozen=True)
class Certified:
    """What is known of a model from the batches so far."""

    layers: Mapping[str, CertifiedLayer] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # layers of layers="all" that cannot be measured
    paths: Known[None] | None = None  # recognised by the uses of kernels
    affine: Known[None] | None = None  # recognised where the graph has no function that could curve

    @property
    def infos(self) -> dict[str, LayerInfo]:
        """How every layer is measured."""
        return {name: layer.info for name, layer in self.layers.items()}


@dataclass(frozen=True)
class CertifiedPass:
    """A forward pass on some samples, certified."""

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
    """What certificates need beside a pass: the wanted layers, options, and copies of the model to run."""

    selection: Selection
    options: Options
    copy: Callable[[], ModelCopy]

    def recorder(self, copy: ModelCopy | None = None) -> Recorder:
        """A recorder of a forward pass of ours on a copy of the model, or of one of the user's that begins now."""
        watched = {name: copy.copy_of(p) if copy else p for name, p in self.selection.parameters.items()}
        return Recorder(self.selection.modules, self.selection.classifier, watched, live=copy is None)

    def gram(self, kernel: Tensor, groups: int) -> Folded:
        """Inner products of a layer's filters, or their diagonal if no more is wanted."""
        return Folded.of(weight_gram(kernel, groups, self.options.diagonal))
