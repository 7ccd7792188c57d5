"""Block traces of one layer under the closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError, naming
from lightning_flatness.functional import LossDerivatives, closed_form_residual, weight_norm
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.functional.closed_form import closed_form_contraction
from lightning_flatness.functional.patches import channel_square_norms
from lightning_flatness.functional.weighting import CHANNELWISE, NORMALIZED, RELATIVE, TRACE, Contraction, Weighting
from lightning_flatness.layers.certificates.tail import TailDerivatives
from lightning_flatness.layers.certified import Certified, CertifiedLayer, CertifiedPass
from lightning_flatness.layers.estimates import BlockTraces
from lightning_flatness.layers.recording import Convolution

# The largest relative change of relative flatness that leaving out classes may cause.
TRUNCATION = 1e-6


@dataclass(frozen=True)
class ClosedForm:
    """What the closed form of one layer is computed from, for some samples. It is not in the graph of their pass."""

    layer: CertifiedLayer
    convolution: Convolution
    tail: TailDerivatives
    loss: LossDerivatives
    curved: tuple[Tensor, Tensor] | None  # curvatures of the tail and dloss/df; None if there are none

    @classmethod
    def of(cls, name: str, certified: CertifiedPass, known: Certified) -> ClosedForm:
        """Return the closed form of a layer in a certified pass."""
        tail, convolution = certified.tails[name].detached(), certified.calls[name][0].convolution
        curved = curved_part(tail, certified.loss)
        return cls(known.layers[name], convolution.detached(), tail, certified.loss, curved)


@dataclass(frozen=True)
class ClosedForms:
    """What the sums of an observed pass are computed from. It is not in the graph of the pass."""

    by_layer: Mapping[str, ClosedForm]
    loss: LossDerivatives
    outcomes: Tensor  # of every sample

    @classmethod
    def of(cls, certified: CertifiedPass, known: Certified, outcomes: Tensor) -> ClosedForms:
        """Return the closed forms of the layers of a certified pass."""
        by_layer = {}
        for name in certified.tails:
            with naming(name):
                by_layer[name] = ClosedForm.of(name, certified, known)
        return cls(by_layer, certified.loss, outcomes)

    def channels(self) -> dict[str, ChannelSums]:
        """Return the sums of every input channel of the layers, for every sample."""
        rows = slice(self.num_samples)
        return {name: ChannelSums.of(form.convolution.read[rows]) for name, form in self.by_layer.items()}

    @property
    def num_samples(self) -> int:
        """Number of samples; a single one may have run as a pair."""
        return 1 if self.loss.is_pair else len(self.outcomes)


def closed_form_layer(form: ClosedForm, weighting: Weighting, diagonal: bool) -> BlockTraces:
    """Return block traces of one layer, or their diagonals, summed over the samples of a pass.

    With many classes (:attr:`CertifiedLayer.gram_norm`), classes of negligible weight are left out. The relative change
    of relative flatness, plain and normalised, is certified to be less than :data:`TRUNCATION`; the other measures do
    not change.
    """
    layer = form.layer
    if layer.gram_norm is not None:
        gram, gram_norm = layer.gram.whole(), layer.gram_norm
        # What is left out is a positive matrix of at most this share of the trace. Its trace times the norm of the Gram
        # matrix bounds the change of relative flatness, which is about the trace times the filters' mean squared norm.
        mean = weight_norm(gram).square() / gram[..., 0].numel()
        tolerance = float(TRUNCATION / 2 * mean / gram_norm)
        part = _gauss_newton(form, weighting, diagonal, tolerance)
        trace = part.samples[:, TRACE].sum()
        whole = _with_curved_part(form, weighting, diagonal, part)
        values = whole.samples.sum(0)
        holds = tolerance * trace * gram_norm <= TRUNCATION * values[RELATIVE].abs()
        if weighting.normalized is not None:
            norm = torch.linalg.matrix_norm(weighting.normalized.double()).amax()  # at least the spectral norm
            holds = holds & (part.left_out * norm <= TRUNCATION * values[NORMALIZED].abs())
        if bool(holds):
            return BlockTraces.of(whole)
    return BlockTraces.of(_with_curved_part(form, weighting, diagonal, _gauss_newton(form, weighting, diagonal, 0.0)))


def _gauss_newton(form: ClosedForm, weighting: Weighting, diagonal: bool, tolerance: float) -> Contraction:
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
    """Add the terms of curved activations, which are on the diagonal, to the sum and to the values of every sample."""
    if form.curved is None:
        return part
    (curvatures, residual), geometry, inputs = form.curved, form.convolution.geometry, form.convolution.inputs

    def of_filters(inputs: Tensor) -> Tensor:  # of every sample, (N, G, S/G)
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
    """Return curvatures of the tail and ``dloss/df``; None if the Hessian is the Gauss-Newton matrix."""
    if tail.curvatures is None:
        return None
    if loss.residual is not None:
        return tail.curvatures, loss.residual
    if bool(tail.curvatures.any()):
        raise BatchError(
            "the activation after it is curved, so its Hessian depends on the targets, and this batch has none. Give "
            "batches of (inputs, targets)."
        )
    return None


def spectral_bound(gram: Tensor) -> Tensor:
    """Return an upper bound of the spectral norm of symmetric matrices: their Schatten norm of order eight."""
    scale = torch.linalg.matrix_norm(gram).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power((gram / scale).float(), 4)
    bound: Tensor = 1.001 * scale * torch.linalg.matrix_norm(fourth).amax().double() ** 0.25  # float32 is rounded
    return bound
