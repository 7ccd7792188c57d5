"""Certificate 2, the tail: from the layer's output ``z`` to the classifier's input ``g``, channels do not mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_flatness.errors import NotClosedFormError
from lightning_flatness.functional.conditions import holds
from lightning_flatness.layers.certificates import ROUNDINGS, Known
from lightning_flatness.layers.certificates.head import Head
from lightning_flatness.layers.cotangents import pull_back, pull_back_where_used, to_positions
from lightning_flatness.model.graph import (
    NoSecondDerivative,
    is_piecewise_linear,
    operations_of,
    random_like,
    second_derivatives,
)


@dataclass(frozen=True)
class Tail:
    """The properties of the tail of one layer that a full certificate has established."""

    channels: Tensor  # c(s), (S,); -1 where unknown
    unknown: Tensor  # the channels whose c(s) is unknown
    curved: bool  # whether slopes may depend on the layer's output
    deviation: float


@dataclass(frozen=True)
class TailDerivatives:
    """The derivatives of the tail of one layer that the closed form needs, for one batch."""

    slopes: Tensor  # a, (N, S, *output)
    curvatures: Tensor | None  # a', the same shape; None if it is zero
    columns: Tensor  # V[:, c(s)], (K, S); zero if c(s) is unknown

    def detached(self) -> TailDerivatives:
        """Return the same derivatives outside the graph."""
        curvatures = None if self.curvatures is None else self.curvatures.detach()
        return TailDerivatives(self.slopes.detach(), curvatures, self.columns.detach())


@dataclass(frozen=True)
class FirstOrder:
    """Three vector-Jacobian products from the features to the output of one layer, and what follows from them."""

    slopes: Tensor  # a[s, p] = dg[c(s)] / dz[s, p], the shape of the output
    channels: Tensor  # c(s), (S,); -1 for a channel without an active slope in the batch, which contributes nothing
    cotangent: Tensor  # u, (N, m), random
    pulled: Tensor  # u pulled back to the output
    deviation: float  # of `pulled` from u[c(s)] a[s, p], relative to the largest entry


def certify_tail(
    node: Tensor, head: Head, logits: Tensor | None, known: Known[Tail] | None
) -> tuple[TailDerivatives, Known[Tail]]:
    """Certify the tail of one layer, and return its slopes and curvatures.

    ``node`` is ``z``, ``(N, S, *output)``. If ``logits`` in the graph are given, tail and head are also certified
    together. A batch whose tail has the same operations as the previous batch needs no full certificate. Tails with
    custom operations, or operations that move entries by indices, are certified in full on every batch.
    """
    operations = operations_of(head.features)
    if known is not None:
        tail = known.value
        if known.recognises(operations):
            slopes = _slopes(head.features, [node], create_graph=tail.curved)[0]
            if slopes is None:
                raise NotClosedFormError(NO_GRAPH)
            curvatures = _along(slopes, node, torch.ones_like(slopes)) if tail.curved else None
            if not len(tail.unknown) or holds(~slopes[:, tail.unknown].any()):
                return _derivatives(slopes, curvatures, tail, head), known.again()
    first = first_order(head.features, [node], create_graph=True)[0]
    failure = _failure(first, head.features)
    if first is None or failure:
        raise NotClosedFormError(failure)
    curvatures = _along(first.slopes, node, torch.ones_like(first.slopes))
    deviations = [first.deviation, _certify_second_order(first, curvatures, node, head.features)]
    curved = operations is None or not is_piecewise_linear(operations)
    tail = Tail(first.channels, (first.channels < 0).nonzero().flatten(), curved, deviation=0.0)
    derivatives = _derivatives(first.slopes, curvatures, tail, head)
    if logits is not None:
        deviations.append(_certify_joint(logits, node, derivatives, head.shift_invariant))
    return derivatives, Known(replace(tail, deviation=max(deviations)), operations)


def follow_tail(node: Tensor, head: Head, known: Known[Tail]) -> tuple[TailDerivatives, Known[Tail]]:
    """Return the derivatives of a tail in half precision, whose rounding errors hide what a certificate looks for.

    The tail was certified in float32. Now its operations must be those of the first pass in half precision, which has
    a ``known`` without fingerprint.
    """
    tail, operations = known.value, operations_of(head.features, samples=len(node))
    if operations is None:
        raise NotClosedFormError(
            "the operations after it (custom ones, or indices) cannot be told apart by their names, and rounding to "
            "half precision hides the rest"
        )
    if known.fingerprint not in (None, operations):
        raise NotClosedFormError("other operations follow it than on the first samples")
    slopes = _slopes(head.features, [node], create_graph=tail.curved)[0]
    if slopes is None:
        raise NotClosedFormError(NO_GRAPH)
    curvatures = _along(slopes, node, torch.ones_like(slopes)) if tail.curved else None
    if len(tail.unknown) and not holds(~slopes[:, tail.unknown].any()):
        channels = _channels_by_bits(slopes.detach(), node, head.features, tail.channels)
        tail = replace(tail, channels=channels, unknown=(channels < 0).nonzero().flatten())
    return _derivatives(slopes, curvatures, tail, head), Known(tail, operations)


def _channels_by_bits(slopes: Tensor, node: Tensor, features: Tensor, known: Tensor) -> Tensor:
    """Return ``c(s)`` like :func:`_channels`, in a precision that cannot tell numbers of channels apart.

    A cotangent of zeros and ones, bit ``k`` of the entries' numbers, gives the slopes or zero. ``known`` is ``c(s)`` on
    earlier batches, or -1.
    """
    numbers = torch.arange(features.shape[1], device=features.device)
    over = [dimension for dimension in range(slopes.ndim) if dimension != 1]
    active, channels, clear = slopes.ne(0).any(over), torch.zeros_like(known), torch.ones_like(known, dtype=torch.bool)
    for bit in range(max(1, (len(numbers) - 1).bit_length())):
        ones = (numbers >> bit & 1).to(features).expand_as(features)
        (pulled,) = pull_back(features, [node], ones)
        is_one = (pulled == slopes).all(over)
        channels += is_one.long() << bit
        clear &= is_one | (pulled == 0).all(over)
    clear &= (channels < len(numbers)) & ((known < 0) | (known == channels))
    if bool((active & ~clear).any()):
        raise NotClosedFormError("between this layer and the classifier the channels mix on some samples")
    return torch.where(active, channels, known)


def _derivatives(slopes: Tensor, curvatures: Tensor | None, tail: Tail, head: Head) -> TailDerivatives:
    columns = head.weight[:, tail.channels.clamp_min(0)] * (tail.channels >= 0)
    curvatures = None if curvatures is None else curvatures.detach().to(columns)
    return TailDerivatives(slopes.detach().to(columns), curvatures, columns)


def why_not_first_order(features: Tensor, nodes: Sequence[Tensor]) -> list[str]:
    """Return how each layer fails the first-order condition, or an empty string; passing certifies nothing yet."""
    return [_failure(first, features) for first in first_order(features, nodes, create_graph=False)]


def first_order(features: Tensor, nodes: Sequence[Tensor], create_graph: bool) -> list[FirstOrder | None]:
    """Return first derivatives of features ``(N, m)`` at outputs ``(N, S, *output)`` of layers; None if not connected.

    The vector-Jacobian product with ones is ``a``. The product with the cotangent ``g_j -> j``, divided by ``a``, is
    ``c(s)``. A third product, with a random cotangent that differs between samples, tests whether such ``c(s)`` exist.
    """
    u = random_like(features)
    entries = torch.arange(features.shape[1], dtype=features.dtype, device=features.device).expand_as(features)
    slopes = _slopes(features, nodes, create_graph)
    weighted, random = (pull_back_where_used(features, nodes, v, create_graph) for v in (entries, u))
    results: list[FirstOrder | None] = []
    for node, a, of_entries, of_random in zip(nodes, slopes, weighted, random, strict=True):
        if a is None or of_entries is None or of_random is None:
            results.append(None)
            continue
        channels = _channels(a.detach(), of_entries.detach(), features.shape[1])
        deviation = _deviation(of_random.detach(), _per_channel(u, channels, node) * a.detach())
        results.append(FirstOrder(a, channels, u, of_random, deviation))
    return results


def _slopes(features: Tensor, nodes: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor | None]:
    # With a cotangent in the graph, a once-differentiable function shows (`second_derivatives`).
    return pull_back_where_used(features, nodes, torch.ones_like(features).requires_grad_(create_graph), create_graph)


def _channels(a: Tensor, weighted: Tensor, num_features: int) -> Tensor:
    """Return ``c(s)``, by least squares over samples and positions; it is meaningless if the tail mixes channels."""
    scale = a.abs().amax()  # products of tiny slopes must not underflow
    a, weighted = (t.double() / scale.clamp_min(torch.finfo(a.dtype).tiny) for t in (a, weighted))
    over = [dimension for dimension in range(a.ndim) if dimension != 1]
    length = a.square().sum(over)
    entries = ((weighted * a).sum(over) / length).round()
    known = (length > 0) & (entries >= 0) & (entries < num_features)
    return torch.where(known, entries, -1).long()


def _failure(first: FirstOrder | None, features: Tensor) -> str:
    """Return how a layer fails the first-order condition: every feature depends on one channel of its own sample."""
    if first is None:
        return NO_GRAPH
    if first.deviation <= _tolerance(features):
        return ""
    return (
        "between this layer and the classifier the channels (or positions, or samples) mix, so the closed form does "
        f"not hold (relative deviation {first.deviation:.1e}). It needs operations that act on every channel alone, "
        "then global pooling: no further convolution, linear layer, flattening of a map, or normalisation across "
        "channels. Choose the last convolution before the pooling with layers=."
    )


def _along(derivative: Tensor, node: Tensor, vector: Tensor) -> Tensor | None:
    """Return the derivative of a first derivative along a vector; None if it does not depend on the layer's output."""
    second = second_derivatives([derivative], [vector], [node], retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        raise NotClosedFormError(
            f"an operation between it and the classifier has no second derivative in torch ({second.message}), so the "
            "curvature cannot be certified. Use an equivalent differentiable operation (relu6(x + 3) / 6 for "
            "hardsigmoid) or choose another layer with layers=."
        )
    return second[0]


def _certify_second_order(first: FirstOrder, curvatures: Tensor | None, node: Tensor, features: Tensor) -> float:
    """Certify that positions of a channel do not interact; return the deviation, relative to the largest entry.

    Pulling back a random ``u`` and differentiating along a random ``v`` must give ``u[c(s)] a'[s, p] v[s, p]``. A tail
    like InstanceNorm fulfils the first-order condition but not this one.
    """
    v = random_like(first.slopes)
    along = _along(first.pulled, node, v)
    zero = torch.zeros_like(first.slopes)
    expected = zero if curvatures is None else _per_channel(first.cotangent, first.channels, node) * curvatures * v
    deviation = _deviation(zero if along is None else along, expected)
    if not deviation <= _tolerance(features):
        raise NotClosedFormError(
            "between this layer and the classifier, positions of one channel interact in a curved way (relative "
            f"deviation {deviation:.1e}), as in InstanceNorm or attention pooling; the closed form needs elementwise "
            "activations. Choose another layer with layers=."
        )
    return deviation


def _certify_joint(logits: Tensor, node: Tensor, derivatives: TailDerivatives, shift_invariant: bool) -> float:
    """Certify tail and head together; return the deviation, relative to the largest entry.

    Pulling a random ``u`` back from the logits must give ``(uᵀV)[c(s)] a[s, p]``. This detects operations that change
    gradients but not values. If adding a number to all logits of a sample does not change the loss, as in
    cross-entropy, ``u`` sums to zero over the classes.
    """
    u = random_like(logits)
    if shift_invariant:
        u = u - u.mean(1, keepdim=True)
    slopes, columns = derivatives.slopes, derivatives.columns
    (pulled,) = pull_back(logits, [node], u)
    expected = to_positions(u @ columns, slopes) * slopes
    deviation = _deviation(pulled, expected)
    if not deviation <= 10 * _tolerance(logits):
        raise NotClosedFormError(
            "the gradients of the logits with respect to its output differ from those computed with the classifier's "
            f"weights (relative deviation {deviation:.1e}): an operation in between changes gradients but not values."
        )
    return deviation


def _tolerance(tensor: Tensor) -> float:
    return ROUNDINGS * torch.finfo(tensor.dtype).eps


def _per_channel(cotangent: Tensor, channels: Tensor, node: Tensor) -> Tensor:
    """Return ``u[c(s)]``, shaped to multiply the layer's output; zero for channels without ``c(s)``."""
    return to_positions(cotangent[:, channels.clamp_min(0)] * (channels >= 0), node)


def _deviation(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).abs().amax()
    scale = torch.maximum(expected.abs().amax(), actual.abs().amax())
    return float(torch.where(difference == 0, difference, difference / scale))


NO_GRAPH = (
    "the classifier's input does not depend on its output through autograd: the forward detaches it, runs that part "
    "under torch.no_grad() or as TorchScript, or does not use it. Choose another layer with layers=."
)
