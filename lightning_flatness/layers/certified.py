"""The results of certificates for layers and for forward passes, as frozen values.

The terms are explained in ``layers/__init__.py``.
"""

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
    """The certificates of one layer after the batches so far, and the description of how the layer is measured."""

    info: LayerInfo
    kernel: Known[Kernel]
    gram: Folded  # Gram matrix of the kernel's filters, or its diagonal
    gram_norm: Tensor | None = None  # upper bound of the spectral norm of `gram`; None if no class may be left out
    tail: Known[Tail] | None = None  # None for a layer measured by Gauss-Newton
    inexact: Inexact | None = None  # why a layer measured by Gauss-Newton is not exact; None if it is
    is_output: bool = False  # whether the layer's output is the logits, so that it needs no backward pass

    def with_deviation(self, *deviations: float) -> CertifiedLayer:
        """Return a copy whose ``info.deviation`` is the maximum of its value so far and ``deviations``.

        A deviation is the relative difference between the two results that a certificate compares.
        """
        return replace(self, info=replace(self.info, deviation=max(self.info.deviation, *deviations)))

    def in_precision(self, precision: str, deviation: float) -> CertifiedLayer:
        """Return a copy whose description says that the layer is measured in ``precision``.

        ``deviation`` is the relative change of the Hessian trace compared with float32.
        """
        return replace(self, info=replace(self.info, precision=precision, precision_deviation=deviation))


@dataclass(frozen=True)
class Certified:
    """The certificates of a model and its layers after the batches so far."""

    layers: Mapping[str, CertifiedLayer] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # with layers="all": name -> why it is not measured
    paths: Known[None] | None = None  # certificate 4; its fingerprint lists the functions that take kernels
    # Counts the batches since `affine.py` last tested all layers that it has to test; the fingerprint is CANNOT_CURVE.
    affine: Known[None] | None = None

    def left_out_after(self, recorded: Pass) -> dict[str, str]:
        """Return the layers that are left out, with the layers that run in a pass but not on the first samples."""
        reason = "it runs on later samples, but not on the first ones, so its Hessian is not a mean over all samples."
        return {**self.left_out, **{name: f"Layer '{name}': {reason}" for name in recorded.late}}

    def without_operations(self) -> Certified:
        """Return a copy without the fingerprints of the tails.

        A fingerprint lists the operations of a tail. In another precision, a tail has other operations. The first pass
        in that precision sets new fingerprints.
        """
        tails = {name: layer.tail and replace(layer.tail, fingerprint=None) for name, layer in self.layers.items()}
        return replace(self, layers={name: replace(self.layers[name], tail=tail) for name, tail in tails.items()})

    @property
    def infos(self) -> dict[str, LayerInfo]:
        """The descriptions of how the layers are measured, keyed by layer name."""
        return {name: layer.info for name, layer in self.layers.items()}


@dataclass(frozen=True)
class CertifiedPass:
    """A recorded and certified forward pass on some samples, with the derivatives of its loss."""

    recorded: Pass
    loss: LossDerivatives
    calls: Calls
    tails: Mapping[str, TailDerivatives]  # keyed by layer name; only for layers measured by the closed form
    outputs: frozenset[str] = frozenset()  # layers whose output is the logits, which need no backward pass

    @property
    def others(self) -> Calls:
        """The calls of the layers that are measured by the Gauss-Newton method, keyed by layer name."""
        return {name: calls for name, calls in self.calls.items() if name not in self.tails}

    @property
    def need_backward(self) -> Calls:
        """The calls of the layers that need backward passes from the logits, keyed by layer name."""
        return {name: calls for name, calls in self.others.items() if name not in self.outputs}


@dataclass(frozen=True)
class Context:
    """What all certificates need: the layers to measure, the options, and a function that copies the model."""

    selection: Selection
    options: Options
    copy: Callable[[], ModelCopy]

    def recorder(self, copy: ModelCopy | None = None) -> Recorder:
        """Return a recorder for a pass of our own on ``copy``, or for the user's forward pass if there is no copy."""
        watched = {name: copy.copy_of(p) if copy else p for name, p in self.selection.parameters.items()}
        return Recorder(
            self.selection.modules, self.selection.classifier, watched, self.selection.idle, live=copy is None
        )

    def gram(self, kernel: Tensor, groups: int) -> Folded:
        """Return the Gram matrix of a kernel's filters, or only its diagonal if the measures need only that."""
        return Folded.of(weight_gram(kernel, groups, self.options.diagonal))
