"""One layer under the closed form: certify the tail on a batch, and measure it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, NotClosedFormError
from lightning_flatness.functional import (
    LossDerivatives,
    closed_form_block_traces,
    closed_form_residual,
    hessian_trace,
    relative_flatness,
    weight_norm,
)
from lightning_flatness.functional.conditions import holds
from lightning_flatness.layers.certificate import certify_head
from lightning_flatness.layers.recording import ConvolutionCall, LayerObservation, Observation
from lightning_flatness.layers.tail import (
    certify_channels,
    certify_curvatures,
    certify_gradient,
    channel_map,
    tail_curvatures,
    tail_slopes,
)
from lightning_flatness.model.graph import Operations, is_piecewise_linear, operations_of

# Largest relative change of relative flatness, by classes that are left out.
TRUNCATION = 1e-6


@dataclass(frozen=True)
class Head:
    """The certified linear map from features to logits, in one forward pass."""

    features: Tensor  # g, (N, m), in the graph of the layers
    weight: Tensor  # V, (K, m)
    deviation: Tensor
    shift_invariant: bool  # of the loss


@dataclass(frozen=True)
class TailDerivatives:
    """What the closed form needs of the tail of one layer, certified on the same batch."""

    slopes: Tensor  # a, (N, S, *output)
    curvatures: Tensor | None  # a', the same shape
    columns: Tensor  # V[:, c(s)], (K, S)
    deviation: float


def certified_head(
    name: str | None, classifier: nn.Module | None, seen: Observation, logits: Tensor, shift_invariant: bool
) -> Head:
    """The head of an observed forward pass; without a classifier the features are the logits.

    Raises:
        NotClosedFormError: the classifier did not run once on one vector for every sample, or the logits are not linear
            in it.
    """
    if classifier is None:
        identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return Head(logits, identity, identity.new_zeros(()), shift_invariant)
    if len(seen.features) != 1 or not isinstance(seen.features[0], Tensor) or seen.classifier_output is None:
        raise NotClosedFormError(
            f"The classifier '{name}' is called {len(seen.features)} times, or not with one tensor; the closed form "
            "needs one linear map."
        )
    features = seen.features[0]
    if features.ndim < 2 or (features.ndim > 2 and set(features.shape[2:]) != {1}):
        raise NotClosedFormError(
            f"The classifier's input has shape {tuple(features.shape)}; the closed form needs one vector for every "
            "sample, as global average pooling gives."
        )
    features = features.flatten(1)
    weight, offset = classifier.weight, classifier.bias
    assert isinstance(weight, Tensor)
    matrix = weight.detach().flatten(1).to(features)
    bias = offset.detach().to(features) if isinstance(offset, Tensor) else None
    deviation = certify_head(
        name, features.detach(), matrix, bias, seen.classifier_output, logits.detach(), shift_invariant
    )
    return Head(features, matrix, deviation, shift_invariant)


@dataclass
class KnownTail:
    """A tail that was certified in full; of the same operations it need not be again with every batch."""

    operations: Operations
    channels: Tensor  # c(s), -1 where unknown
    unknown: Tensor  # channels for which it is
    curved: bool
    deviation: float
    batches: int = 0  # since then


# A tail is certified in full with the first batch, with one of so many, and whenever its operations are others.
FULL_EVERY = 16


def certified_tail(
    name: str, observed: LayerObservation, head: Head, logits: Tensor | None, known: dict[str, KnownTail]
) -> TailDerivatives:
    """Slopes, curvatures and channels of the tail of one layer, certified.

    The last certificate joins tail and head: gradients from the logits, if they are in the graph, must be what the two
    say.

    Args:
        name: of the layer.
        observed: what it did.
        head: of the same pass.
        logits: of the same pass, if they are in the graph.
        known: tails that were certified with batches before.

    Raises:
        NotClosedFormError: the tail is not what the closed form needs.
    """
    features, output = head.features, observed.output
    operations = operations_of(features)
    before = known.get(name)
    if before is not None and operations is not None and before.operations == operations:
        before.batches += 1
        if before.batches < FULL_EVERY:
            slopes = tail_slopes(name, features, output, again=before.curved)
            curvatures = tail_curvatures(name, slopes, output) if before.curved else None
            if not len(before.unknown) or holds(~slopes[:, before.unknown].any()):
                columns = head.weight[:, before.channels.clamp_min(0)] * (before.channels >= 0)
                return _derivatives(slopes, curvatures, columns, before.deviation)
    slopes = tail_slopes(name, features, output)
    channels = channel_map(features, output, slopes)
    first = certify_channels(name, features, output, slopes, channels)
    curvatures = tail_curvatures(name, slopes, output)
    second = certify_curvatures(name, features, output, slopes, curvatures, channels)
    columns = head.weight[:, channels.clamp_min(0)] * (channels >= 0)
    joint = 0.0
    if logits is not None:
        joint = certify_gradient(name, logits, output, slopes.detach(), columns, head.shift_invariant)
    if operations is not None:
        unknown = (channels < 0).nonzero().flatten()
        curved = not is_piecewise_linear(operations)
        known[name] = KnownTail(operations, channels, unknown, curved, max(first, second, joint))
    return _derivatives(slopes, curvatures, columns, max(first, second, joint))


def _derivatives(slopes: Tensor, curvatures: Tensor | None, columns: Tensor, deviation: float) -> TailDerivatives:
    return TailDerivatives(slopes.detach(), None if curvatures is None else curvatures.detach(), columns, deviation)


def closed_form_layer(
    name: str,
    call: ConvolutionCall,
    tail: TailDerivatives,
    loss: LossDerivatives,
    diagonal: bool,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Block traces of one layer, ``(G, S/G, S/G)``, or their diagonals, ``(G, S/G)``; summed over a batch's samples.

    With ``weights`` those classes are left out that do not matter: relative flatness changes by less than
    :data:`TRUNCATION` of itself, which is certified, and the other measures not at all.

    Args:
        name: of the layer.
        call: what it did.
        tail: what follows it.
        loss: derivatives at the logits.
        diagonal: only the diagonals.
        weights: inner products of its filters, and a bound of their spectral norm (:func:`spectral_bound`); None to
            take every class.

    Raises:
        BatchError: the tail is curved and there are no targets.
    """
    of_filters: Tensor | None = None
    curvatures = tail.curvatures
    if curvatures is not None and loss.residual is not None:
        of_filters = closed_form_residual(call.inputs, call.geometry, curvatures, tail.columns, loss.residual)
    elif curvatures is not None and bool(curvatures.any()):
        raise BatchError(
            f"Layer '{name}': the activation after it is curved, so its Hessian depends on the targets, and this "
            "batch has none. Give batches of (inputs, targets)."
        )

    def traces(tolerance: float = 0.0) -> Tensor:
        with torch.no_grad():
            total = closed_form_block_traces(
                call.inputs, call.geometry, tail.slopes, tail.columns, loss.curvature, tolerance, diagonal
            )
        if of_filters is not None:
            (total if diagonal else total.diagonal(dim1=1, dim2=2)).add_(of_filters)
        return total

    if weights is not None:
        gram, gram_norm = weights
        # What is left out is a positive matrix of this share of the trace, less its diagonal; that trace times the norm
        # of the Gram matrix bounds the change. Relative flatness is about the trace times the filters' mean squared
        # norm; whether it is, is looked at after.
        mean = weight_norm(gram).square() / gram[..., 0].numel()
        tolerance = float(TRUNCATION / 2 * mean / gram_norm)
        total = traces(tolerance)
        whole = hessian_trace(total) if of_filters is None else hessian_trace(total) - of_filters.sum()
        if bool(tolerance * whole * gram_norm <= TRUNCATION * relative_flatness(total, gram).abs()):
            return total
    return traces()


def spectral_bound(gram: Tensor) -> Tensor:
    """An upper bound of the spectral norm of symmetric matrices, by the Schatten norm of order eight.

    Example:
        >>> bool(3 <= spectral_bound(torch.diag(torch.tensor([1.0, 2.0, 3.0]))[None]) < 3.1)
        True
    """
    scale = torch.linalg.matrix_norm(gram).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power((gram / scale).float(), 4)
    bound: Tensor = 1.001 * scale * torch.linalg.matrix_norm(fourth).amax().double() ** 0.25  # float32 is rounded
    return bound
