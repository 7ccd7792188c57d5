"""Certificate 2, the tail: the operations between a layer and the classifier treat every channel by itself.

Let ``z`` be the layer's output and ``g`` the classifier's input. Channel ``s`` of ``z`` may reach only one entry of
``g``, whose index is ``c(s)``. The slopes are ``a[s, p] = dg[c(s)] / dz[s, p]`` at the output positions ``p``, and the
curvatures ``a'[s, p] = da[s, p] / dz[s, p]`` (``docs/theory.md``, "The closed form").
"""

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
    """The properties of one layer's tail that the full certificate, :func:`certify_tail`, has found."""

    channels: Tensor  # c(s), (S,); -1 if unknown, because channel s had only zero slopes
    unknown: Tensor  # indices of the channels whose c(s) is unknown
    curved: bool  # whether the slopes may depend on the layer's output, so that there are curvatures
    deviation: float  # largest relative deviation that the certificate has found


@dataclass(frozen=True)
class TailDerivatives:
    """The derivatives of one layer's tail on one batch, detached, from which the closed form computes block traces."""

    slopes: Tensor  # a[s, p], (N, S, *output)
    curvatures: Tensor | None  # a'[s, p], the same shape; None if all are zero
    columns: Tensor  # columns V[:, c(s)] of the classifier's weight, (K, S); zero if c(s) is unknown


@dataclass(frozen=True)
class FirstOrder:
    """First derivatives of the classifier's input ``g`` ``(N, m)`` with respect to one layer's output."""

    slopes: Tensor  # a[s, p], (N, S, *output)
    channels: Tensor  # c(s), (S,); -1 for a channel whose slopes are all zero in this batch, which adds nothing
    cotangent: Tensor  # a random u, (N, m)
    pulled: Tensor  # the vector-Jacobian product with u, (N, S, *output)
    deviation: float  # of `pulled` from u[c(s)] a[s, p], relative to the largest entry; large if channels mix


def certify_tail(
    node: Tensor, head: Head, logits: Tensor | None, known: Known[Tail] | None
) -> tuple[TailDerivatives, Known[Tail]]:
    """Certify the tail of one layer, and return its derivatives.

    The full certificate tests first and second derivatives. It is skipped if ``known`` was certified on a batch whose
    tail had the same operations. One of sixteen batches gets the full certificate in any case. So does a batch in which
    a channel with unknown ``c(s)`` has a slope other than zero. So does every batch if the tail has custom operations,
    or operations that move entries by indices.

    Args:
        node: the layer's output ``z``, ``(N, S, *output)``.
        head: the certified head, whose ``features`` are ``g``.
        logits: the logits with their autograd graph, or None. If given, the whole map from the layer's output to the
            logits (tail and head together) is certified, too.
        known: the tail that earlier batches have certified, or None.

    Raises:
        NotClosedFormError: the closed form does not hold for this layer.
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
    """Return the derivatives of a tail that runs in half precision.

    Rounding errors of half precision would hide what :func:`certify_tail` tests. So ``known`` was certified in float32,
    and has no fingerprint at first. The first pass in half precision sets the fingerprint to the list of the tail's
    operations. In every later pass, the tail must have the same operations.

    Raises:
        NotClosedFormError: the operations differ or cannot be compared, or channels mix.
    """
    tail, operations = known.value, operations_of(head.features, samples=len(node))
    if operations is None:
        raise NotClosedFormError(
            "after this layer there is a custom operation, an operation such as indexing, or a nonlinear function "
            "after a reduction. In half precision, it cannot be certified that these do not mix channels"
        )
    if known.fingerprint not in (None, operations):
        raise NotClosedFormError("the operations after this layer differ from those on the first samples")
    slopes = _slopes(head.features, [node], create_graph=tail.curved)[0]
    if slopes is None:
        raise NotClosedFormError(NO_GRAPH)
    curvatures = _along(slopes, node, torch.ones_like(slopes)) if tail.curved else None
    if len(tail.unknown) and not holds(~slopes[:, tail.unknown].any()):
        channels = _channels_by_bits(slopes.detach(), node, head.features, tail.channels)
        tail = replace(tail, channels=channels, unknown=(channels < 0).nonzero().flatten())
    return _derivatives(slopes, curvatures, tail, head), Known(tail, operations)


def _channels_by_bits(slopes: Tensor, node: Tensor, features: Tensor, known: Tensor) -> Tensor:
    """Return ``c(s)`` for a tail in half precision, bit by bit; -1 if unknown.

    The method of :func:`_channels` fails in half precision, which cannot represent large indices. Here one cotangent is
    pulled back for every bit ``k``. Its entry ``j`` is bit ``k`` of the number ``j``. In channel ``s``, the
    vector-Jacobian product equals the slopes if bit ``k`` of ``c(s)`` is one, and zero if this bit is zero. ``known``
    is ``c(s)`` from earlier batches, -1 if unknown.

    Raises:
        NotClosedFormError: channels mix. A product is neither the slopes nor zero, or ``c(s)`` differs from ``known``.
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
    """Return the derivatives of a tail, detached and in the dtype of the classifier's weight."""
    columns = head.weight[:, tail.channels.clamp_min(0)] * (tail.channels >= 0)
    curvatures = None if curvatures is None else curvatures.detach().to(columns)
    return TailDerivatives(slopes.detach().to(columns), curvatures, columns)


def why_not_first_order(features: Tensor, nodes: Sequence[Tensor]) -> list[str]:
    """Return why each layer fails the first-order condition, or an empty string if it passes.

    This is a first test that rules layers out. A layer that passes still needs :func:`certify_tail`.
    """
    return [_failure(first, features) for first in first_order(features, nodes, create_graph=False)]


def first_order(features: Tensor, nodes: Sequence[Tensor], create_graph: bool) -> list[FirstOrder | None]:
    """Return the first derivatives of the classifier's input with respect to the outputs of layers.

    ``features`` is the classifier's input ``g`` ``(N, m)``, and ``nodes`` are the outputs ``(N, S, *output)``. The
    result is None for a layer on which ``g`` does not depend.

    Three vector-Jacobian products are computed for all layers at once. With the cotangent ``1`` for all entries, the
    product is ``a``. With the cotangent ``j`` for entry ``j``, it is ``c(s) a[s, p]``, from which ``c(s)`` follows. The
    third cotangent is random and differs between samples; it tests whether every channel reaches a single entry.
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
    """Return the slopes ``a`` of each layer; None for a layer on which the features do not depend."""
    # The cotangent requires gradients, because otherwise `second_derivatives` could not find a custom function that is
    # differentiable only once.
    return pull_back_where_used(features, nodes, torch.ones_like(features).requires_grad_(create_graph), create_graph)


def _channels(a: Tensor, weighted: Tensor, num_features: int) -> Tensor:
    """Compute ``c(s)``, ``(S,)``, by least squares over samples and positions; -1 if the result is not an index.

    ``a`` are the slopes, and ``weighted`` is ``c(s) a[s, p]``. If the tail mixes channels, ``weighted`` is another
    tensor, and the result is meaningless.
    """
    scale = a.abs().amax()  # products of tiny slopes must not underflow
    a, weighted = (t.double() / scale.clamp_min(torch.finfo(a.dtype).tiny) for t in (a, weighted))
    over = [dimension for dimension in range(a.ndim) if dimension != 1]
    length = a.square().sum(over)
    entries = ((weighted * a).sum(over) / length).round()
    known = (length > 0) & (entries >= 0) & (entries < num_features)
    return torch.where(known, entries, -1).long()


def _failure(first: FirstOrder | None, features: Tensor) -> str:
    """Return why a layer fails the first-order condition, or an empty string if it passes.

    The condition is that the vector-Jacobian product with a random ``u`` is ``u[c(s)] a[s, p]``.
    """
    if first is None:
        return NO_GRAPH
    if first.deviation <= _tolerance(features):
        return ""
    return (
        "between this layer and the classifier, channels (or positions, or samples) mix (relative deviation "
        f"{first.deviation:.1e}). The closed form needs operations on every channel alone, and then global pooling: no "
        "further convolution, linear layer, flattening of a map, or normalisation across channels. Choose the last "
        "convolution before the pooling with layers=."
    )


def _along(derivative: Tensor, node: Tensor, vector: Tensor) -> Tensor | None:
    """Return the gradient of ``<derivative, vector>`` with respect to ``node``; None if there is no dependence."""
    second = second_derivatives([derivative], [vector], [node], retain_graph=True)
    if isinstance(second, NoSecondDerivative):
        raise NotClosedFormError(
            "an operation between this layer and the classifier has no second derivative in torch "
            f"({second.message}), so the curvature cannot be certified. Use an equivalent differentiable operation "
            "(relu6(x + 3) / 6 for hardsigmoid) or choose another layer with layers=."
        )
    return second[0]


def _certify_second_order(first: FirstOrder, curvatures: Tensor | None, node: Tensor, features: Tensor) -> float:
    """Certify that positions of one channel do not interact; return the deviation, relative to the largest entry.

    The vector-Jacobian product of ``g`` with a random ``u`` is differentiated along a random ``v``. The result must be
    ``u[c(s)] a'[s, p] v[s, p]``. A tail with InstanceNorm meets the first-order condition but not this one.
    """
    v = random_like(first.slopes)
    along = _along(first.pulled, node, v)
    zero = torch.zeros_like(first.slopes)
    expected = zero if curvatures is None else _per_channel(first.cotangent, first.channels, node) * curvatures * v
    deviation = _deviation(zero if along is None else along, expected)
    if not deviation <= _tolerance(features):
        raise NotClosedFormError(
            "between this layer and the classifier, positions of one channel interact nonlinearly (relative "
            f"deviation {deviation:.1e}), as in InstanceNorm or attention pooling; the closed form needs elementwise "
            "activations. Choose another layer with layers=."
        )
    return deviation


def _certify_joint(logits: Tensor, node: Tensor, derivatives: TailDerivatives, shift_invariant: bool) -> float:
    """Certify the operations from the layer to the logits; return the deviation, relative to the largest entry.

    The vector-Jacobian product of the logits with a random ``u`` ``(N, K)`` must be ``(uᵀV)[c(s)] a[s, p]``, where
    ``V`` is the classifier's weight. This detects operations that change gradients but not values. With
    ``shift_invariant``, adding a number to all logits of a sample does not change the loss, so ``u`` sums to zero over
    the classes.
    """
    u = random_like(logits)
    if shift_invariant:
        u = u - u.mean(1, keepdim=True)
    slopes, columns = derivatives.slopes, derivatives.columns
    (pulled,) = pull_back(logits, [node], u)
    expected = to_positions(u.to(columns) @ columns, slopes) * slopes
    deviation = _deviation(pulled, expected)
    if not deviation <= 10 * max(_tolerance(logits), _tolerance(columns)):
        raise NotClosedFormError(
            "the gradients of the logits with respect to this layer's output differ from those computed with the "
            f"classifier's weights (relative deviation {deviation:.1e}). An operation after the layer changes "
            "gradients but not values."
        )
    return deviation


def _tolerance(tensor: Tensor) -> float:
    """Return the largest allowed deviation of derivatives in the precision of this tensor."""
    return ROUNDINGS * torch.finfo(tensor.dtype).eps


def _per_channel(cotangent: Tensor, channels: Tensor, node: Tensor) -> Tensor:
    """Return ``u[c(s)]``, where ``u`` is a cotangent, in a shape that broadcasts against the layer's output.

    The result is zero where ``c(s)`` is unknown.
    """
    return to_positions(cotangent[:, channels.clamp_min(0)] * (channels >= 0), node)


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two tensors, relative to their largest entry."""
    difference = (actual - expected).abs().amax()
    scale = torch.maximum(expected.abs().amax(), actual.abs().amax())
    return float(torch.where(difference == 0, difference, difference / scale))


NO_GRAPH = (
    "the classifier's input does not depend on this layer's output through autograd. The forward does not use the "
    "output, detaches it, or runs what follows under torch.no_grad() or as TorchScript. Choose another layer with "
    "layers=."
)
