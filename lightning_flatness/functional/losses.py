"""Losses: their first and second derivatives with respect to the logits, and what the sum over samples is divided by.

A loss is a function from logits ``f`` ``(N, K)`` and targets to :class:`LossDerivatives`. All are taken in float64:
``π - y`` and ``1 - max π`` cancel for confident samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError, is_out_of_memory
from lightning_flatness.functional.conditions import holds
from lightning_flatness.functional.curvature import ClassCurvature, Curvature, DenseCurvature


class LossDerivatives(NamedTuple):
    """Derivatives of the loss of every sample of a batch; their sums are to be divided by the sum of ``normalizer``."""

    curvature: Curvature  # Λ
    residual: Tensor | None  # dloss/df, float64 (N, K); None without targets
    num_samples: int  # that count, i.e. are not ignored
    normalizer: float  # of the mean: the number of samples, or the sum of their class weights


class Loss:
    """Base of all losses."""

    # Whether a number added to all logits of a sample changes nothing.
    shift_invariant = False
    name: str

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Derivatives at ``logits`` ``(N, K)``.

        Raises:
            BatchError: targets that do not fit, or that are missing where needed.
        """
        raise NotImplementedError

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over samples, float64 and differentiable; targets are not checked.

        Example:
            >>> MeanSquaredError().total(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]))
            tensor(5., dtype=torch.float64)
        """
        return self._summed(logits.double(), targets)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``torch.nn.functional.cross_entropy``, with the same options and the same mean over samples.

    It is ``-sum_k q_k log π_k`` with ``q`` made of the target, the smoothing and the weights; hence ``Λ = c (diag(π) -
    π πᵀ)`` and ``dloss/df = c π - q`` with ``c = sum_k q_k``.

    Args:
        label_smoothing: ``ε``: the target becomes ``(1 - ε) y + ε / K``.
        class_weight: ``(K,)``; with class indices the mean is weighted too, as in torch.
        ignore_index: samples with this class index do not count.

    Example:
        >>> derivatives = CrossEntropy()(torch.zeros(1, 4), torch.tensor([2]))
        >>> derivatives.residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """

    label_smoothing: float = 0.0
    class_weight: tuple[float, ...] | None = None
    ignore_index: int = -100

    shift_invariant = True
    name = "cross_entropy"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Derivatives at ``logits`` ``(N, K)``."""
        samples, classes = logits.shape
        if classes < 2:
            raise BatchError(
                "The logits have one column. Cross-entropy needs a column for every class; for two classes train with "
                "two logits, or use loss='binary_cross_entropy'."
            )
        pi = torch.softmax(logits.double(), dim=1)
        weight = None
        if self.class_weight is not None:
            if len(self.class_weight) != classes:
                raise BatchError(f"class_weight has {len(self.class_weight)} entries, and the model {classes} classes.")
            weight = torch.tensor(self.class_weight, dtype=torch.float64, device=logits.device)
        if targets is None:
            if weight is not None:
                raise BatchError("With class_weight= the loss depends on the targets, and this batch has none.")
            return LossDerivatives(ClassCurvature(pi, pi), None, samples, float(samples))

        targets = targets.clone()  # an ordinary tensor also under inference mode
        if targets.shape == logits.shape and targets.is_floating_point():
            kept, count = None, samples
            q, normalizer = targets.double(), float(samples)
            if not holds(((q >= 0) & q.isfinite()).all()):
                raise BatchError("Targets that are probabilities must be finite and not negative.")
        else:
            kept = self._kept(targets, classes, samples)
            count = samples if kept is None else int(kept.sum())
            # A GPU does not survive an index that is out of range.
            indices = (targets if kept is None else torch.where(kept, targets, 0)).long().clamp(0, classes - 1)
            q = torch.zeros_like(pi).scatter_(1, indices[:, None], 1.0)
            normalizer = float(count)
            if weight is not None:
                of_samples = weight[indices]
                normalizer = float((of_samples if kept is None else of_samples * kept).sum())
        q = (1 - self.label_smoothing) * q + self.label_smoothing / classes
        if weight is not None:
            q = q * weight
        if kept is not None:
            q = q * kept[:, None]
        c = q.sum(1, keepdim=True)
        residual = c * pi - q
        # The entries add up to zero. As minus the sum of all others the largest keeps its digits when π is nearly q.
        top = q.argmax(1, keepdim=True)
        residual.scatter_(1, top, -residual.scatter(1, top, 0.0).sum(1, keepdim=True))
        return LossDerivatives(ClassCurvature(c * pi, pi), residual, count, normalizer)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        weight = None if self.class_weight is None else logits.new_tensor(self.class_weight)
        targets = targets.double() if targets.is_floating_point() else targets.long()
        return nn.functional.cross_entropy(
            logits,
            targets,
            weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _kept(self, targets: Tensor, classes: int, samples: int) -> Tensor | None:
        """Which samples are not ignored; None for all."""
        wrong_type = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
        if targets.ndim != 1 or wrong_type:
            raise BatchError(
                f"The targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; cross-entropy is measured "
                "for class indices, integers of shape (samples,), or for probabilities, floating-point numbers of "
                "shape (samples, classes)."
            )
        if len(targets) != samples:
            raise BatchError(f"The batch has {samples} logits and {len(targets)} targets.")
        kept = targets != self.ignore_index
        if not holds(((targets >= 0) & (targets < classes) | ~kept).all()):
            counted = targets[kept]
            raise BatchError(
                f"The targets lie in {int(counted.min())}..{int(counted.max())}, but the model has {classes} classes "
                f"(0..{classes - 1})."
            )
        return None if holds(kept.all()) else kept


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """``binary_cross_entropy_with_logits``, averaged over samples and over the ``K`` labels, each yes or no.

    Example:
        >>> derivatives = BinaryCrossEntropy()(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        >>> derivatives.residual
        tensor([[-0.2500,  0.2500]], dtype=torch.float64)
    """

    name = "binary_cross_entropy"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Derivatives at ``logits`` ``(N, K)``."""
        f = logits.double()
        on, off, labels = f.sigmoid(), (-f).sigmoid(), f.shape[1]
        residual = None
        if targets is not None:
            y = _like_logits(targets, logits, self.name)
            if not holds(((y >= 0) & (y <= 1)).all()):
                raise BatchError("The targets of binary_cross_entropy must lie between 0 and 1.")
            residual = ((1 - y) * on - y * off) / labels
        return LossDerivatives(ClassCurvature(on * off / labels), residual, len(f), float(len(f)))

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        y = _like_logits(targets, logits, self.name)
        return nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") / logits.shape[1]


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """``mse_loss``, averaged over samples and over the ``K`` outputs.

    Example:
        >>> derivatives = MeanSquaredError()(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        >>> derivatives.residual
        tensor([[-1.,  0.]], dtype=torch.float64)
    """

    name = "mse"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Derivatives at ``logits`` ``(N, K)``."""
        f, outputs = logits.double(), logits.shape[1]
        residual = None if targets is None else 2 * (f - _like_logits(targets, logits, self.name)) / outputs
        return LossDerivatives(ClassCurvature(torch.full_like(f, 2 / outputs)), residual, len(f), float(len(f)))

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        y = _like_logits(targets, logits, self.name)
        return nn.functional.mse_loss(logits, y, reduction="sum") / logits.shape[1]


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A user's own loss; its derivatives come from autograd, the second as a ``K x K`` matrix for every sample.

    Args:
        function: from ``(logits, targets)`` to the loss of every sample, ``(N,)``; the measured loss is their mean. It
            gets logits in float64, and some samples of a batch at a time, so it must not use statistics of the batch.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> loss = CustomLoss(lambda f, y: cross_entropy(f, y, reduction="none"))
        >>> loss(torch.zeros(1, 4), torch.tensor([2])).residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """

    function: Callable[[Tensor, Tensor], Tensor]

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Derivatives at ``logits`` ``(N, K)``."""
        if targets is None:
            raise BatchError(f"The loss '{self.name}' needs targets, and this batch has none.")
        with torch.enable_grad():
            f, losses = self._losses(logits.detach(), targets)
            if not isinstance(losses, Tensor) or losses.shape != f.shape[:1]:
                shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise BatchError(
                    f"The loss '{self.name}' returns {shape} for {len(f)} samples; it must return a loss for every "
                    "sample, shape (samples,). With a loss of torch use reduction='none', and a mean over all but the "
                    "samples."
                )
            if not losses.requires_grad:
                raise BatchError(f"The loss '{self.name}' does not depend on the logits through autograd.")
            (residual,) = torch.autograd.grad(losses.sum(), f, create_graph=True)
            matrices = torch.zeros(*f.shape, f.shape[1], dtype=f.dtype, device=f.device)
            for k in range(f.shape[1]) if residual.requires_grad else ():
                (row,) = torch.autograd.grad(residual[:, k].sum(), f, retain_graph=True, allow_unused=True)
                if row is not None:
                    matrices[:, k] = row
            if not matrices.isfinite().all():
                raise BatchError(f"The second derivative of the loss '{self.name}' is not finite.")
            for mask in separating_masks(len(f)).to(f.device):
                (others,) = torch.autograd.grad(losses[mask].sum(), f, retain_graph=True)
                if bool(others[~mask].any()):
                    raise BatchError(
                        f"The loss '{self.name}' of one sample depends on other samples of the batch (a contrastive "
                        "loss? a mean inside?), so the loss is not a mean over samples."
                    )
        matrices = matrices.double()
        return LossDerivatives(
            DenseCurvature.of((matrices + matrices.mT) / 2), residual.detach().double(), len(f), float(len(f))
        )

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.function(logits, targets.clone()).double().sum()

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """In float64, or, where the function holds tensors that do not go with that, in the logits' own type."""
        failed: Exception | None = None
        for dtype in dict.fromkeys((torch.float64, logits.dtype)):
            f = logits.to(dtype, copy=True).requires_grad_()
            try:
                return f, self.function(f, targets.clone())
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                failed = failed or error
        raise BatchError(
            f"The loss '{self.name}' fails on logits of shape {tuple(logits.shape)} and targets of shape "
            f"{tuple(targets.shape)}: {type(failed).__name__}: {failed}"
        ) from failed


def separating_masks(samples: int) -> Tensor:
    """Masks ``(M, N)`` such that for every two samples one has the first and not the second; about ``log2(N) + 2``.

    Every sample is in another set of half of the masks; of two different sets of one size none holds the other, and by
    Sperner's theorem no more samples can do with so few masks.

    Example:
        >>> separating_masks(5).int()
        tensor([[1, 1, 1, 0, 0],
                [1, 0, 0, 1, 1],
                [0, 1, 0, 1, 0],
                [0, 0, 1, 0, 1]], dtype=torch.int32)
    """
    number = next(m for m in count() if comb(m, m // 2) >= samples)
    masks = torch.zeros(number, samples, dtype=torch.bool)
    for sample, chosen in zip(range(samples), combinations(range(number), number // 2)):  # noqa: B905
        masks[list(chosen), sample] = True
    return masks


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)}


def find_loss(
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor],
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
) -> Loss:
    """The loss of a name, of a module of torch, or of a function to per-sample losses.

    Args:
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``; ``nn.CrossEntropyLoss``,
            ``nn.BCEWithLogitsLoss`` or ``nn.MSELoss`` with their own options; or a function from ``(logits, targets)``
            to the loss of every sample.
        label_smoothing: of cross-entropy.
        class_weight: of cross-entropy.
        ignore_index: of cross-entropy.

    Raises:
        FlatnessError: an unknown loss, or options that it does not have.

    Example:
        >>> find_loss("cross_entropy", label_smoothing=0.1)
        CrossEntropy(label_smoothing=0.1, class_weight=None, ignore_index=-100)
    """
    options = label_smoothing != 0 or class_weight is not None or ignore_index != -100
    if options and loss != "cross_entropy":
        raise FlatnessError(
            "label_smoothing, class_weight and ignore_index are options of loss='cross_entropy'; give another loss as "
            "a function from (logits, targets) to the loss of every sample."
        )
    if isinstance(loss, Loss):
        return loss
    if type(loss) is nn.CrossEntropyLoss:
        return _cross_entropy(_mean(loss).label_smoothing, loss.weight, loss.ignore_index)
    if type(loss) is nn.MSELoss:
        _mean(loss)
        return MeanSquaredError()
    if type(loss) is nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None:
        _mean(loss)
        return BinaryCrossEntropy()
    if loss == "cross_entropy":
        return _cross_entropy(label_smoothing, class_weight, ignore_index)
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if isinstance(loss, str) or not callable(loss):
        raise FlatnessError(
            f"loss={loss!r} is not known. There are {', '.join(map(repr, LOSSES))}; for another one give a function "
            "from (logits, targets) to the loss of every sample."
        )
    return CustomLoss(loss)


def _cross_entropy(smoothing: float, class_weight: Sequence[float] | Tensor | None, ignore_index: int) -> CrossEntropy:
    if not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= 1:
        raise FlatnessError(f"label_smoothing={smoothing} must lie between 0 and 1.")
    if not isinstance(ignore_index, int):
        raise FlatnessError(f"ignore_index={ignore_index!r} must be a whole number.")
    try:
        weight = None if class_weight is None else tuple(float(value) for value in class_weight)
    except (TypeError, ValueError):
        weight = (-1.0,)
    if weight is not None and not all(0 <= value < float("inf") for value in weight):
        raise FlatnessError("class_weight must be a number for every class, finite and not negative.")
    return CrossEntropy(smoothing, weight, ignore_index)


def _mean(loss: nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss) -> Any:
    if loss.reduction != "mean":
        raise FlatnessError(
            f"loss={type(loss).__name__}(reduction={loss.reduction!r}): flatness is that of a mean over samples; use "
            "reduction='mean'."
        )
    return loss


def _like_logits(targets: Tensor, logits: Tensor, name: str) -> Tensor:
    if logits.shape[1] == 1 and targets.ndim == 1:
        targets = targets[:, None]
    if targets.shape != logits.shape or targets.is_complex():
        raise BatchError(
            f"The targets have shape {tuple(targets.shape)}; loss='{name}' needs that of the model's output, "
            f"{tuple(logits.shape)}."
        )
    return targets.clone().double()
