"""Compute the block traces of one layer by the closed form.

``docs/theory.md``, "The closed form", derives the formula. It needs the first derivatives of the layer's tail, called
slopes, and the second derivatives, called curvatures. The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, naming
from lightning_flatness.functional import ClassCurvature, LossDerivatives, closed_form_residual, weight_norm
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.functional.classifier import classifier_contraction
from lightning_flatness.functional.closed_form import closed_form_contraction
from lightning_flatness.functional.patches import channel_square_norms
from lightning_flatness.functional.weighting import CHANNELWISE, NORMALIZED, RELATIVE, TRACE, Contraction, Weighting
from lightning_flatness.layers.certificates.tail import TailDerivatives
from lightning_flatness.layers.certified import Certified, CertifiedLayer, CertifiedPass
from lightning_flatness.layers.convolution import Convolution
from lightning_flatness.layers.estimates import BlockTraces

# Leaving out classes may change relative flatness and normalised relative flatness by at most this share.
TRUNCATION = 1e-6


@dataclass(frozen=True)
class ClosedForm:
    """The detached tensors from which the closed form computes one layer's block traces for some samples."""

    layer: CertifiedLayer
    convolution: Convolution
    tail: TailDerivatives
    loss: LossDerivatives
    curved: tuple[Tensor, Tensor] | None  # the curvatures and dloss/df; None if the curvatures are known to be 0

    @classmethod
    def of(cls, name: str, certified: CertifiedPass, known: Certified) -> ClosedForm:
        """Collect the tensors for the layer ``name`` from a certified pass; ``known`` has the certificates so far."""
        tail, convolution = certified.tails[name], certified.calls[name][0].convolution
        curved = curved_part(tail, certified.loss)
        return cls(known.layers[name], convolution.without_output(), tail, certified.loss, curved)


@dataclass(frozen=True)
class OutputForm:
    """The detached tensors from which block traces are computed for a layer whose output is the logits."""

    layer: CertifiedLayer
    convolution: Convolution
    loss: LossDerivatives

    @classmethod
    def of(cls, name: str, certified: CertifiedPass, known: Certified) -> OutputForm:
        """Collect the tensors for the layer ``name`` from a certified pass; ``known`` has the certificates so far."""
        return cls(known.layers[name], certified.calls[name][0].convolution.without_output(), certified.loss)


@dataclass(frozen=True)
class ClosedForms:
    """The detached tensors from which the block traces of all layers are computed for some samples.

    Sums over the samples can be computed from these tensors after the graph of the forward pass has been freed.
    """

    by_layer: Mapping[str, ClosedForm | OutputForm]
    loss: LossDerivatives
    outcomes: Tensor  # (N, 6), for every sample the OUTCOMES of `sums.py`

    @classmethod
    def of(cls, certified: CertifiedPass, known: Certified, outcomes: Tensor) -> ClosedForms:
        """Collect the tensors from a certified pass, for every layer that is measured without backward passes."""
        by_layer: dict[str, ClosedForm | OutputForm] = {}
        for name in certified.tails:
            with naming(name):
                by_layer[name] = ClosedForm.of(name, certified, known)
        by_layer |= {name: OutputForm.of(name, certified, known) for name in certified.outputs}
        return cls(by_layer, certified.loss, outcomes)

    def channels(self) -> dict[str, ChannelSums]:
        """Return the mean and squared deviations of each sample's input channels, keyed by layer name."""
        rows = slice(self.num_samples)
        return {name: ChannelSums.of(form.convolution.read[rows]) for name, form in self.by_layer.items()}

    @property
    def num_samples(self) -> int:
        """The number of samples. A single sample that ran as a pair of equal rows counts once."""
        return 1 if self.loss.is_pair else len(self.outcomes)


def closed_form_layer(form: ClosedForm | OutputForm, weighting: Weighting, diagonal: bool) -> BlockTraces:
    """Return the block traces of one layer, or only their diagonals, summed over the samples of a pass.

    If there are many classes and classes may be left out, the layer has a :attr:`CertifiedLayer.gram_norm`. Then
    classes that add little to the trace are left out. Of the measures, this changes only relative flatness and
    normalised relative flatness. If a bound of the relative change exceeds :data:`TRUNCATION`, all classes are used.
    """
    if isinstance(form, OutputForm):
        return _output(form, weighting, diagonal)
    layer = form.layer
    if layer.gram_norm is not None and weighting.gram is not None:
        gram_norm, normalized_norm = layer.gram_norm, weighting.normalized_norm
        # The terms that are left out sum to a positive semi-definite matrix. Its trace is at most `tolerance` times the
        # full trace. The trace of this matrix times the norm of the Gram matrix bounds the change of relative flatness.
        # Relative flatness itself is about the full trace times the mean squared norm of the filters. The same holds
        # for normalised relative flatness, with the Gram matrix of the kernel times the channels' standard deviations.
        share = _share(weighting.gram, gram_norm)
        if weighting.normalized is not None and normalized_norm is not None:
            share = torch.minimum(share, _share(weighting.normalized, normalized_norm))
        tolerance = float(TRUNCATION / 2 * share)
        part = _gauss_newton(form, weighting, diagonal, tolerance)
        trace = part.samples[:, TRACE].sum()
        whole = _with_curved_part(form, weighting, diagonal, part)
        values = whole.samples.sum(0)
        holds = tolerance * trace * gram_norm <= TRUNCATION * values[RELATIVE].abs()
        if normalized_norm is not None:
            holds = holds & (part.left_out * normalized_norm <= TRUNCATION * values[NORMALIZED].abs())
        if bool(holds):
            return BlockTraces.of(whole)
    return BlockTraces.of(_with_curved_part(form, weighting, diagonal, _gauss_newton(form, weighting, diagonal, 0.0)))


def _share(gram: Tensor, norm: Tensor) -> Tensor:
    """Return the mean squared norm of the filters, divided by ``norm``.

    ``gram`` is the Gram matrix of the filters, and ``norm`` is an upper bound of its spectral norm.
    """
    mean = weight_norm(gram).square() / gram[..., 0].numel()
    return mean / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _output(form: OutputForm, weighting: Weighting, diagonal: bool) -> BlockTraces:
    """Return the block traces of a layer whose output is the logits."""
    convolution, curvature = form.convolution, form.loss.curvature
    assert isinstance(curvature, ClassCurvature)  # `certify` finds such layers only with a ClassCurvature
    features, kernel = convolution.inputs.flatten(1), convolution.weight.flatten(1)
    return BlockTraces.of(classifier_contraction(features, kernel, curvature, weighting, diagonal))


def _gauss_newton(form: ClosedForm, weighting: Weighting, diagonal: bool, tolerance: float) -> Contraction:
    """Compute the Gauss-Newton term of the closed form, without classes that add little to its trace.

    Together, the classes that are left out add at most the share ``tolerance`` of the trace.
    """
    convolution, tail = form.convolution, form.tail
    with torch.no_grad():
        return closed_form_contraction(
            convolution.inputs,
            convolution.geometry,
            tail.slopes,
            tail.columns,
            form.loss.curvature,
            weighting,
            tolerance,
            diagonal,
        )


def _with_curved_part(form: ClosedForm, weighting: Weighting, diagonal: bool, part: Contraction) -> Contraction:
    """Add the term of the closed form that contains curvatures to ``part``, the Gauss-Newton term.

    The term changes the diagonals of the block traces, and the measures of every sample.
    """
    if form.curved is None:
        return part
    (curvatures, residual), geometry, inputs = form.curved, form.convolution.geometry, form.convolution.inputs

    def of_filters(inputs: Tensor) -> Tensor:  # the term of every sample, (N, G, S/G)
        return closed_form_residual(inputs, geometry, curvatures, form.tail.columns, residual, summed=False)

    added = of_filters(inputs)
    total = part.total.clone()
    (total if diagonal else total.diagonal(dim1=1, dim2=2)).add_(added.sum(0))
    values = part.samples.clone()
    values[:, TRACE] += added.flatten(1).sum(1)
    if not diagonal and weighting.gram is not None:
        values[:, RELATIVE] += (added * weighting.gram.diagonal(dim1=1, dim2=2)).flatten(1).sum(1)
    if not diagonal and weighting.normalized is not None:
        scaled = of_filters(weighting.scaled(inputs))
        values[:, NORMALIZED] += (scaled * weighting.normalized.diagonal(dim1=1, dim2=2)).flatten(1).sum(1)
    if weighting.kernel is not None:
        pulled = (residual.double() @ form.tail.columns.double()).unflatten(1, added.shape[1:])
        slopes = curvatures.reshape(*pulled.shape, -1).double()
        norms = channel_square_norms(inputs.double(), geometry)  # (N, G, C/G, P)
        squares = weighting.kernel.double().flatten(2).square().sum(2).unflatten(0, added.shape[1:])  # (G, S/G, C/G)
        values[:, CHANNELWISE] += torch.einsum("ngs,gsc,ngsp,ngcp->n", pulled, squares, slopes, norms)
    return Contraction(total, values, part.left_out)


def curved_part(tail: TailDerivatives, loss: LossDerivatives) -> tuple[Tensor, Tensor] | None:
    """Return the curvatures of the tail and the loss's gradient at the logits.

    They determine the part of the Hessian that the Gauss-Newton matrix leaves out. Return None if all curvatures are
    known to be zero. The Hessian then equals the Gauss-Newton matrix.

    Raises:
        BatchError: some curvatures are not zero, and the batch has no targets.
    """
    if tail.curvatures is None:
        return None
    if loss.residual is not None:
        return tail.curvatures, loss.residual
    if bool(tail.curvatures.any()):
        raise BatchError(
            "the activation after it is curved, so the layer's Hessian depends on the targets, but this batch has no "
            "targets. Give batches of (inputs, targets)."
        )
    return None
