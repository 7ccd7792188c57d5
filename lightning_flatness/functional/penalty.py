"""The flatness of a classifier as a penalty, a differentiable function of the classifier's input, logits and weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_flatness.checks import check_class_weight, check_type, check_word
from lightning_flatness.errors import BatchError
from lightning_flatness.functional.losses import IGNORED

PENALTIES = ("relative_flatness", "layerwise_flatness")


def flatness_penalty(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    measure: str = "relative_flatness",
    normalize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute the flatness of a linear classifier, differentiable with respect to features, logits and weight.

        κ = (1/Z) Σ_n c_n ‖g_n‖² Var_{k~π_n}(w_k)

    Here ``g_n`` is the input of the classifier for sample ``n``, ``π_n`` the softmax of the logits, and ``w_k`` row
    ``k`` of the weight. ``c_n`` is the sum of the target's entries after weighting. It is 0 for an ignored sample.
    For any other class index it is 1, unless there are class weights. ``Z`` is the divisor of the mean cross-entropy.
    For class indices with class weights, ``Z`` is the sum of the samples' weights. Otherwise it is the number of
    samples that are not ignored.

    ``κ`` is exactly the relative flatness of the mean cross-entropy (``docs/theory.md``, "Flatness as a penalty"). For
    the layer-wise measure, ``‖W‖² (1 - Σ_k π_k²)`` replaces the variance. Training on ``loss + λ κ`` needs no second
    backward pass.

    Args:
        features: ``g``, ``(N, m)``; further dimensions must have size one.
        logits: ``f = W g + b``, ``(N, K)``.
        weight: ``W``, ``(K, m)``.
        targets: targets of the loss. The result depends on them only if there are class weights, ignored samples, or
            class probabilities that do not sum to one.
        measure: ``"relative_flatness"`` or ``"layerwise_flatness"``.
        normalize: measure the equivalent classifier ``W σ`` on the features ``g / σ``, where ``σ`` is the standard
            deviation of every feature in this batch. ``σ`` has no gradient. Features that are constant in the batch
            are left out.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``. It changes the result only with class weights, or
            if class probabilities do not sum to one.
        class_weight: weight of every class, ``(K,)``.
        ignore_index: samples with this class index are ignored.
        reduction: ``"mean"`` returns ``κ``. ``"none"`` returns ``c_n ‖g_n‖² Var(w_k)`` of every sample, ``(N,)``.

    Returns:
        A scalar in units of the loss (``(N,)`` with ``reduction="none"``). It is float64 if ``features``, ``logits`` or
        ``weight`` is float64, else float32, also under autocast.

    Raises:
        FlatnessError: an argument is no tensor, or an option is invalid.
        BatchError: shapes do not fit, targets are missing, or ``normalize`` is given a single sample.

    Source:
        Petzka et al. 2021 (arXiv 2001.00939); Adilova et al. 2023 (arXiv 2307.02337).

    Example:
        >>> classifier = nn.Linear(20, 5)
        >>> g, targets = torch.randn(8, 20), torch.arange(8) % 5
        >>> logits = classifier(g)
        >>> loss = nn.functional.cross_entropy(logits, targets)
        >>> (loss + 0.1 * flatness_penalty(g, logits, classifier.weight)).backward()
    """
    check_word("measure", measure, PENALTIES)
    check_word("reduction", reduction, ("mean", "none"))
    for name, tensor in {"features": features, "logits": logits, "weight": weight}.items():
        check_type(name, tensor, Tensor, "a tensor (of a layer, its parameter `weight`)")
    if targets is not None:
        check_type("targets", targets, Tensor, "a tensor")
    g, f, w = (tensor.flatten(1) if tensor.ndim > 2 else tensor for tensor in (features, logits, weight))
    _check_shapes(g, f, w)
    dtype = torch.float32
    for tensor in (g, f, w):
        dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.autocast(g.device.type, enabled=False):
        g, f, w = g.to(dtype), f.to(dtype), w.to(dtype)
        if normalize:
            sigma, inverse = _deviations(g.detach(), torch.finfo(features.dtype).eps)
            g, w = g * inverse, w * sigma
        flatness = g.square().sum(1) * (_variance(f, w) if measure == "relative_flatness" else _layerwise(f, w))
        counts, normalizer = target_sums(f, targets, label_smoothing, class_weight, ignore_index)
        flatness = flatness if counts is None else counts * flatness
        return flatness if reduction == "none" else flatness.sum() / normalizer


def _check_shapes(features: Tensor, logits: Tensor, weight: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (features, logits, weight)]
    matrices = all(len(shape) == 2 for shape in shapes)
    if not matrices or shapes[1] != (shapes[0][0], shapes[2][0]) or shapes[0][1] != shapes[2][1]:
        raise BatchError(
            f"The shapes of features {shapes[0]}, logits {shapes[1]} and weight {shapes[2]} do not fit together. They "
            "must be (N, m), (N, K) and (K, m), for a linear classifier that takes one feature vector per sample."
        )
    if shapes[1][1] < 2:
        raise BatchError("The logits have one column, but cross-entropy needs at least two, one for every class.")


def _offsets(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``δ = π - e_p``, ``(N, K)``, and the likeliest class ``p`` of every sample, ``(N,)``.

    ``π`` is the softmax of the logits, and ``e_p`` the one-hot vector of ``p``. Entry ``p`` of ``δ`` is computed as
    minus the sum of the other entries, because ``π_p - 1`` would lose precision if ``π_p`` is close to one.
    """
    likeliest = logits.detach().argmax(1)
    is_likeliest = nn.functional.one_hot(likeliest, logits.shape[1]).bool()
    others = torch.softmax(logits, 1).masked_fill(is_likeliest, 0.0)
    return torch.where(is_likeliest, -others.sum(1, keepdim=True), others), likeliest


def _variance(logits: Tensor, weight: Tensor) -> Tensor:
    """Compute ``Var_{k~π}(w_k) = Σ_k π_k ‖w_k‖² - ‖Σ_k π_k w_k‖²`` of every sample, ``(N,)``.

    If ``π_p`` is close to one, both terms are about ``‖w_p‖²``, and their difference loses precision. So the function
    computes the equal expression ``Σ_k δ_k ‖w_k‖² - <u, 2 w_p + u>`` with ``u = δ W``, whose terms are then small.
    ``δ`` and ``p`` are those of :func:`_offsets`.
    """
    delta, likeliest = _offsets(logits)
    centred = weight - weight.mean(0)  # an offset that all rows share changes nothing, but costs precision
    offset = delta @ centred
    # On GPUs, the backward pass of an embedding sums in a fixed order; the backward pass of indexing does not.
    reference = nn.functional.embedding(likeliest, centred)
    return delta @ centred.square().sum(1) - (offset * (2 * reference + offset)).sum(1)


def _layerwise(logits: Tensor, weight: Tensor) -> Tensor:
    """Compute ``‖W‖² (1 - Σ_k π_k²)`` of every sample, ``(N,)``, where ``1 - Σ_k π_k² = -2 δ_p - ‖δ‖²``."""
    delta, likeliest = _offsets(logits)
    of_likeliest = delta.gather(1, likeliest[:, None])[:, 0]
    return weight.square().sum() * (-2 * of_likeliest - delta.square().sum(1))


def _deviations(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the standard deviation of every feature, and its inverse; both are zero for a constant feature."""
    if len(features) < 2:
        raise BatchError(
            "normalize=True needs the standard deviation of every feature over the batch, but the batch has one "
            "sample. Use larger batches, or normalize=False. If only the last batch has one sample, set "
            "drop_last=True in the DataLoader."
        )
    g = features.double()
    sigma, largest = g.std(0, correction=0), g.abs().amax(0)
    sigma = torch.where(sigma > eps * largest, sigma, 0.0)
    inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
    return sigma.to(features.dtype), inverse.to(features.dtype)


def target_sums(
    logits: Tensor,
    targets: Tensor | None,
    label_smoothing: float,
    class_weight: Sequence[float] | Tensor | None,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | int]:
    """Return ``c_n`` and ``Z`` of :func:`flatness_penalty`; without targets, ``c_n`` is None, since all are one.

    The values of targets are not checked. A check would have to wait for the GPU, and the user's loss already uses the
    same targets.
    """
    samples, classes = logits.shape
    if targets is None:
        if class_weight is not None:
            raise BatchError("With class_weight= the penalty depends on the targets. Give targets=.")
        return None, samples
    weight = logits.new_ones(classes)
    if class_weight is not None:
        check_class_weight(class_weight)
        weight = torch.as_tensor(class_weight, dtype=logits.dtype, device=logits.device)
    if weight.shape != (classes,):
        raise BatchError(
            f"class_weight has shape {tuple(weight.shape)}, but there are {classes} classes. Give one weight per class."
        )
    if targets.is_floating_point() and targets.shape == logits.shape:
        return ((1 - label_smoothing) * targets.to(weight) + label_smoothing / classes) @ weight, samples
    if targets.shape != (samples,) or targets.is_floating_point() or targets.is_complex():
        raise BatchError(
            f"The targets have shape {tuple(targets.shape)} and dtype {targets.dtype}. They must be either class "
            f"indices (integers of shape ({samples},)) or probabilities (floating-point numbers of shape "
            f"{tuple(logits.shape)})."
        )
    targets = targets.long()  # a smaller type wraps around: in uint8, 156 equals -100
    kept = (targets != ignore_index).to(logits.dtype)
    of_samples = weight[targets.clamp(0, classes - 1)] * kept
    return (1 - label_smoothing) * of_samples + label_smoothing * weight.mean() * kept, of_samples.sum()
