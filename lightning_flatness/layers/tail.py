"""The tail, from the layer's output ``z`` to the classifier's input ``g``: slopes, curvatures, certificates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_flatness.errors import NotClosedFormError
from lightning_flatness.model.graph import differentiable_once, random_like

# The certificates compare two ways of computing the same number; this many rounding errors are allowed between them.
ROUNDINGS = 1e3


def tail_slopes(name: str, features: Tensor, output: Tensor, again: bool = True) -> Tensor:
    """Slopes ``a[s, p] = dg[c(s)] / dz[s, p]``, by one vector-Jacobian product with ones.

    Args:
        name: of the layer, for errors.
        features: ``g``, ``(N, m)``, in the graph of ``output``.
        output: ``z``, ``(N, S, *spatial)``.
        again: whether the slopes are to be in the graph, as :func:`tail_curvatures` needs it.

    Returns:
        The shape of ``output``.

    Raises:
        NotClosedFormError: the features do not depend on the output.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> bool((tail_slopes("conv", z.mean(2), z) == 0.25).all())
        True
    """
    if not features.requires_grad:
        raise NotClosedFormError(_no_graph(name))
    # With a cotangent in the graph, a once-differentiable function shows (`differentiable_once`).
    pulled = _pull_back(features, output, torch.ones_like(features).requires_grad_(again), again)
    if pulled is None:
        raise NotClosedFormError(_no_graph(name))
    return pulled


def tail_curvatures(name: str, slopes: Tensor, output: Tensor) -> Tensor | None:
    """Curvatures ``a' = da[s, p] / dz[s, p]``; None where no slope depends on the output.

    Raises:
        NotClosedFormError: an operation of the tail has no second derivative in torch.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> a = tail_slopes("conv", (z**2).mean(2), z)
        >>> bool((tail_curvatures("conv", a, z) == 0.5).all())
        True
    """
    if not slopes.requires_grad:
        return None
    if differentiable_once([slopes]):
        raise NotClosedFormError(_no_second_derivative(name, "a custom function marked once_differentiable"))
    return _second_derivative(name, slopes, output, torch.ones_like(slopes))


def channel_map(features: Tensor, output: Tensor, slopes: Tensor) -> Tensor:
    """The entry ``c(s)`` of the features that each channel reaches, by one vector-Jacobian product with ``g_j -> j``.

    Returns:
        Whole numbers ``(S,)``; -1 for a channel without an active slope in the batch, which contributes nothing.
        A tail that mixes channels gives meaningless entries: :func:`certify_channels` decides.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> g = torch.cat([torch.zeros(2, 2), z.mean(2)], dim=1)
        >>> channel_map(g, z, tail_slopes("conv", g, z))
        tensor([2, 3, 4])
    """
    pulled = _pull_back(features, output, _entries(features))
    a = slopes.detach()
    return _channels(a, torch.zeros_like(a) if pulled is None else pulled.detach(), features.shape[1])


def why_not_closed_form(outputs: Mapping[str, Tensor], features: Tensor) -> dict[str, str]:
    """Layers that fail the first-order condition, and how; three backward passes for all of them together.

    A quick look, so that most layers of a deep network need no closer one; it certifies nothing.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> why_not_closed_form({"conv": z}, z.mean(2))
        {}
    """
    nodes = list(outputs.values())
    if not features.requires_grad:
        return {name: _no_graph(name) for name in outputs}
    u = random_like(features)
    ones, entries, random = (
        torch.autograd.grad(features, nodes, cotangent, retain_graph=True, allow_unused=True)
        for cotangent in (torch.ones_like(features), _entries(features), u)
    )
    failures = {}
    for (name, output), a, weighted, found in zip(outputs.items(), ones, entries, random, strict=True):
        if a is None or weighted is None or found is None:
            failures[name] = _no_graph(name)
            continue
        deviation = _deviation(found, _per_channel(u, _channels(a, weighted, features.shape[1]), output) * a)
        if not deviation <= _tolerance(features):
            failures[name] = _channels_mix(name, deviation)
    return failures


def _entries(features: Tensor) -> Tensor:
    return torch.arange(features.shape[1], dtype=features.dtype, device=features.device).expand_as(features)


def _channels(a: Tensor, weighted: Tensor, num_features: int) -> Tensor:
    scale = a.abs().amax()  # products of tiny slopes must not underflow
    a, weighted = (t.double() / scale.clamp_min(torch.finfo(a.dtype).tiny) for t in (a, weighted))
    over = [dimension for dimension in range(a.ndim) if dimension != 1]
    length = a.square().sum(over)
    entries = ((weighted * a).sum(over) / length).round()
    known = (length > 0) & (entries >= 0) & (entries < num_features)
    return torch.where(known, entries, -1).long()


def certify_channels(name: str, features: Tensor, output: Tensor, slopes: Tensor, channels: Tensor) -> float:
    """Certify that every feature depends on one channel of its own sample: the first-order condition.

    Pulling back a random cotangent ``u`` must give ``u[c(s)] a[s, p]``. Every sample has its own ``u``, so that a tail
    that mixes samples fails too.

    Returns:
        The largest deviation found, relative to the largest entry.

    Raises:
        NotClosedFormError: naming the layer.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> g = z.relu().mean(2)
        >>> a = tail_slopes("conv", g, z)
        >>> certify_channels("conv", g, z, a, channel_map(g, z, a))
        0.0
    """
    u = random_like(features)
    a = slopes.detach()
    pulled = _pull_back(features, output, u)
    found = torch.zeros_like(a) if pulled is None else pulled.detach()
    deviation = _deviation(found, _per_channel(u, channels, output) * a)
    if not deviation <= _tolerance(features):
        raise NotClosedFormError(_channels_mix(name, deviation))
    return deviation


def certify_curvatures(
    name: str, features: Tensor, output: Tensor, slopes: Tensor, curvatures: Tensor | None, channels: Tensor
) -> float:
    """Certify that positions of a channel do not interact: the second-order condition.

    Pulling back a random ``u`` and differentiating along a random ``v`` must give ``u[c(s)] a'[s, p] v[s, p]``. A tail
    like InstanceNorm fulfils the first-order condition and not this one.

    Returns:
        The largest deviation found, relative to the largest entry.

    Raises:
        NotClosedFormError: naming the layer.

    Example:
        >>> z = torch.randn(2, 3, 4, requires_grad=True)
        >>> g = z.relu().mean(2)
        >>> a = tail_slopes("conv", g, z)
        >>> certify_curvatures("conv", g, z, a, tail_curvatures("conv", a, z), channel_map(g, z, a))
        0.0
    """
    u, v = random_like(features), random_like(slopes)
    pulled = _pull_back(features, output, u)
    along = None
    if pulled is not None and pulled.requires_grad:
        along = _second_derivative(name, pulled, output, v)
    found = torch.zeros_like(slopes) if along is None else along
    expected = torch.zeros_like(slopes) if curvatures is None else _per_channel(u, channels, output) * curvatures * v
    deviation = _deviation(found, expected)
    if not deviation <= _tolerance(features):
        raise NotClosedFormError(
            f"Layer '{name}': between this layer and the classifier, positions of one channel interact in a curved "
            f"way (relative deviation {deviation:.1e}), as in InstanceNorm or attention pooling; the closed form "
            "needs elementwise activations. Choose another layer with layers=."
        )
    return deviation


def certify_gradient(
    name: str, logits: Tensor, output: Tensor, slopes: Tensor, columns: Tensor, shift_invariant: bool = True
) -> float:
    """Certify tail and head together: pulling random ``u`` back from the logits must give ``(uᵀV)[s] a[s, p]``.

    Here something shows that changes gradients and no values. ``u`` adds up to zero over the classes for a loss that
    does not see a number added to all logits of a sample, like cross-entropy.

    Returns:
        The largest deviation found, relative to the largest entry.

    Raises:
        NotClosedFormError: naming the layer.

    Example:
        >>> z, V = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 3)
        >>> certify_gradient("conv", z.mean(2) @ V.T, z, torch.full((2, 3, 4), 0.25), V) < 1e-5
        True
    """
    u = random_like(logits)
    if shift_invariant:
        u = u - u.mean(1, keepdim=True)
    pulled: Tensor | None
    (pulled,) = torch.autograd.grad(logits, output, u, retain_graph=True, allow_unused=True)
    found = torch.zeros_like(slopes) if pulled is None else pulled
    expected = (u @ columns).reshape(*slopes.shape[:2], *[1] * (slopes.ndim - 2)) * slopes
    deviation = _deviation(found, expected)
    if not deviation <= 10 * _tolerance(logits):
        raise NotClosedFormError(
            f"Layer '{name}': gradients from the logits to it are not those of its classifier (relative deviation "
            f"{deviation:.1e}): something between changes gradients and no values."
        )
    return deviation


def _tolerance(tensor: Tensor) -> float:
    return ROUNDINGS * torch.finfo(tensor.dtype).eps


def _per_channel(cotangent: Tensor, channels: Tensor, output: Tensor) -> Tensor:
    """``u[c(s)]``, shaped to multiply ``output``; zero for channels without ``c(s)``."""
    picked = cotangent[:, channels.clamp_min(0)] * (channels >= 0)
    return picked.reshape(*picked.shape, *[1] * (output.ndim - 2))


def _deviation(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).abs().amax()
    scale = torch.maximum(expected.abs().amax(), found.abs().amax())
    return float(torch.where(difference == 0, difference, difference / scale))


def _pull_back(features: Tensor, output: Tensor, cotangent: Tensor, again: bool = True) -> Tensor | None:
    pulled: Tensor | None
    (pulled,) = torch.autograd.grad(
        features, output, cotangent, retain_graph=True, create_graph=again, allow_unused=True
    )
    return pulled


def _second_derivative(name: str, slopes: Tensor, output: Tensor, vector: Tensor) -> Tensor | None:
    result: Tensor | None
    try:
        (result,) = torch.autograd.grad(slopes, output, vector, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise NotClosedFormError(_no_second_derivative(name, str(error))) from error
    return result


def _channels_mix(name: str, deviation: float) -> str:
    return (
        f"Layer '{name}': between this layer and the classifier the channels (or positions, or samples) mix, so the "
        f"closed form does not hold (relative deviation {deviation:.1e}). It needs operations that act on every "
        "channel by itself, then global pooling: no further convolution, linear layer, flattening of a map, or "
        "normalisation across channels. Choose the last convolution before the pooling with layers=."
    )


def _no_second_derivative(name: str, what: str) -> str:
    return (
        f"Layer '{name}': an operation between it and the classifier has no second derivative in torch ({what}), so "
        "the curvature cannot be certified. Use an equivalent differentiable operation (relu6(x + 3) / 6 for "
        "hardsigmoid) or choose another layer with layers=."
    )


def _no_graph(name: str) -> str:
    return (
        f"Layer '{name}': the classifier's input does not depend on its output through autograd: the forward detaches "
        "it, runs that part under torch.no_grad() or as TorchScript, or does not use it. Choose another layer with "
        "layers=."
    )
