"""Losses, with their first and second derivatives with respect to the logits, and the divisor of the mean loss.

A loss maps logits ``f`` ``(N, K)`` and targets to :class:`LossDerivatives`. All derivatives are computed in float64.
In float32, ``π - y`` would lose most digits if the softmax ``π`` is close to the one-hot target ``y``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.functional.autograd_curvature import Curvature
from lightning_flatness.functional.conditions import holds
from lightning_flatness.functional.curvature import ClassCurvature
from lightning_flatness.functional.loss_labels import weights_text, with_hash


class LossDerivatives(NamedTuple):
    """The derivatives of the loss of every sample in a batch, and the ``normalizer`` of the batch.

    The mean over samples is the sum over samples divided by ``normalizer``.

    Attributes:
        curvature: ``Λ`` of every sample, the second derivative of its loss with respect to its logits.
        residual: ``dloss/df``, the first derivative, float64 ``(N, K)``; None without targets.
        num_samples: number of samples that are not ignored.
        normalizer: ``num_samples``, or the sum of the samples' weights if targets are class indices with class weights.
        outcomes: four numbers of every sample, float64 ``(N, 4)``; None without targets. Column 0 is the weight of the
            sample in the mean. Column 1 is 0 for an ignored sample, else 1. Column 2 is the loss of the sample times
            its weight. Column 3 is 1 if the target's class has the largest logit, else 0; NaN if not known.
        is_pair: True if the batch holds one sample twice; each of the two rows then counts half.

    Example:
        >>> CrossEntropy()(torch.zeros(3, 4), torch.tensor([2, 0, 1])).normalizer
        3.0
    """

    curvature: Curvature
    residual: Tensor | None
    num_samples: int
    normalizer: float
    outcomes: Tensor | None = None
    is_pair: bool = False

    def halved(self) -> LossDerivatives:
        """Halve the derivatives of a batch that holds one sample twice, so that the two rows count as one sample."""
        residual = None if self.residual is None else self.residual / 2
        outcomes = None if self.outcomes is None else self.outcomes / 2
        return LossDerivatives(
            self.curvature.scaled(0.5), residual, self.num_samples // 2, self.normalizer / 2, outcomes, True
        )


def are_integers(targets: Tensor) -> bool:
    """Return whether targets are integers, as class indices are; ``bool`` does not count."""
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def are_correct(logits: Tensor, targets: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return 1 for every sample whose target's class has the largest logit, and 0 for all others, in float64.

    Ignored samples get 0. The result is NaN for all samples if targets are not class indices or if there is only one
    class. ``kept`` is a mask of the samples that are not ignored. Without it, the result is also NaN for targets
    outside ``0..K-1``, because they may mark ignored samples. For ``logits`` of shape ``(..., N, K)``, the result has
    shape ``(..., N)``.
    """
    samples, classes = logits.shape[-2:]
    if targets.shape != (samples,) or classes < 2 or not are_integers(targets):
        return torch.full(logits.shape[:-1], torch.nan, dtype=torch.float64, device=logits.device)
    targets = targets.long()  # a smaller type wraps around: in uint8, 256 equals 0
    correct = (logits.argmax(-1) == targets).double()
    if kept is not None:
        return correct * kept
    return torch.where((targets >= 0) & (targets < classes), correct, torch.nan)


def outcomes_of(
    losses: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """Return ``outcomes`` of :class:`LossDerivatives`, ``(N, 4)``; column 3 is NaN unless targets are class indices.

    ``losses`` ``(N,)`` are the losses times the weights of the samples. Without ``weights``, every sample that is not
    ignored has the weight 1. ``kept`` is a mask of the samples that are not ignored; None means all samples.
    """
    ones = torch.ones_like(losses, dtype=torch.float64)
    counts = ones if kept is None else kept.double()
    correct = are_correct(logits, targets, kept)
    return torch.stack([counts if weights is None else weights.double(), counts, losses.double(), correct], dim=1)


class Loss:
    """Base class of losses.

    For a loss of your own, a function is enough; see :class:`CustomLoss`. Write a subclass if you know a formula for
    the second derivative. The subclass needs a ``name`` and the method ``__call__``, and for spectra and landscapes
    also ``total``.

    ``shift_invariant`` tells whether the loss stays the same when one number is added to all logits of a sample.

    Example:
        >>> class HalfSquare(Loss):
        ...     name = "half_square"
        ...
        ...     def __call__(self, logits, targets=None):
        ...         curvature = ClassCurvature(torch.ones_like(logits).double())
        ...         return LossDerivatives(curvature, (logits - targets).double(), len(logits), len(logits))
        >>> HalfSquare()(torch.zeros(1, 2), torch.ones(1, 2)).residual
        tensor([[-1., -1.]], dtype=torch.float64)
    """

    shift_invariant = False
    name: str

    @property
    def label(self) -> str:
        """The name. A loss with attributes also gets a hash of them, because other losses may have the same name."""
        return with_hash(self.name, self)

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at ``logits`` ``(N, K)``.

        Raises:
            BatchError: the targets do not fit the logits or the loss.
        """
        raise NotImplementedError

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum of the loss over samples, float64 and differentiable; values of targets are not checked."""
        return self._summed(logits.double(), targets)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


IGNORED = -100  # torch's default


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """The loss ``torch.nn.functional.cross_entropy``, with the same options and the same mean over samples.

    The loss of a sample is ``-sum_k q_k log π_k``, where ``π`` is the softmax of the logits and ``q`` the target after
    smoothing and weighting. With ``c = sum_k q_k``, the first derivative is ``dloss/df = c π - q`` and the second one
    ``Λ = c (diag(π) - π πᵀ)``.

    Targets are either class indices (integers ``(N,)``) or probabilities (floating-point numbers ``(N, K)``).

    Args:
        label_smoothing: ``ε``; the target ``y`` is replaced by ``(1 - ε) y + ε / K``.
        class_weight: weight of every class, ``(K,)``. If targets are class indices, the mean over samples is weighted
            too, as in torch.
        ignore_index: samples with this class index are ignored.

    Example:
        >>> derivatives = CrossEntropy()(torch.zeros(1, 4), torch.tensor([2]))
        >>> derivatives.residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """

    label_smoothing: float = 0.0
    class_weight: tuple[float, ...] | None = None
    ignore_index: int = IGNORED

    shift_invariant = True
    name = "cross_entropy"

    @property
    def label(self) -> str:
        """The name and the options that are not the default, e.g. ``cross_entropy(label_smoothing=0.1)``."""
        weight, options = self.class_weight, []
        if self.label_smoothing:
            options.append(f"label_smoothing={self.label_smoothing:g}")
        if weight is not None and any(one != 1 for one in weight):
            options.append(f"class_weight={weights_text(weight)}")
        if self.ignore_index != IGNORED:
            options.append(f"ignore_index={self.ignore_index}")
        return f"{self.name}({', '.join(options)})" if options else self.name

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at ``logits`` ``(N, K)``."""
        samples, classes = logits.shape
        if classes < 2:
            raise BatchError(
                "The logits have one column, but cross-entropy needs one for every class. For two classes, train with "
                "two logits or use loss='binary_cross_entropy'. For regression, use loss='mse'."
            )
        pi = torch.softmax(logits.double(), dim=1)
        weight = None
        if self.class_weight is not None:
            if len(self.class_weight) != classes:
                raise BatchError(f"class_weight has {len(self.class_weight)} entries, but there are {classes} classes.")
            weight = torch.tensor(self.class_weight, dtype=torch.float64, device=logits.device)
        if targets is None:
            if weight is not None or self.ignore_index != IGNORED:
                option = "class_weight=" if weight is not None else "ignore_index="
                raise BatchError(f"With {option} the loss depends on the targets, but this batch has none.")
            return LossDerivatives(ClassCurvature(pi, pi), None, samples, float(samples))

        targets = targets.clone()  # an ordinary tensor, even if the batch was made in inference mode
        if targets.shape == logits.shape and targets.is_floating_point():
            kept, count, of_samples = None, samples, None
            q, normalizer = targets.double(), float(samples)
            if not holds(((q >= 0) & q.isfinite()).all()):
                raise BatchError(
                    "Targets that are probabilities must be finite and not negative. For regression, give loss='mse'."
                )
            if bool(((q.sum(1) - 1).abs() > ROUNDED).any()):
                warnings.warn(SEVERAL_LABELS, stacklevel=2)
        else:
            kept = self._kept(targets, classes, samples)
            count = samples if kept is None else int(kept.sum())
            # Clamped, because a GPU does not recover from the error of an index out of range.
            indices = (targets if kept is None else torch.where(kept, targets, 0)).long().clamp(0, classes - 1)
            q = torch.zeros_like(pi).scatter_(1, indices[:, None], 1.0)
            normalizer, of_samples = float(count), None
            if weight is not None:
                of_samples = weight[indices] if kept is None else weight[indices] * kept
                normalizer = float(of_samples.sum())
        if self.label_smoothing:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / classes
        if weight is not None:
            q = q * weight
        if kept is not None:
            q = q * kept[:, None]
        c = q.sum(1, keepdim=True)
        residual = c * pi - q
        # A row of the residual sums to zero. So its entry at the largest entry of q is minus the sum of the others,
        # which is accurate even when π is close to q.
        top = q.argmax(1, keepdim=True)
        residual.scatter_(1, top, -residual.scatter(1, top, 0.0).sum(1, keepdim=True))
        losses = -torch.where(q > 0, q * torch.log_softmax(logits.double(), dim=1), 0.0).sum(1)
        outcomes = outcomes_of(losses, logits, targets, of_samples, kept)
        return LossDerivatives(ClassCurvature(c * pi, pi), residual, count, normalizer, outcomes)

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
        """Return a mask of the samples that are not ignored, or None if no sample is ignored."""
        if targets.ndim != 1 or not are_integers(targets):
            raise BatchError(
                f"The targets have shape {tuple(targets.shape)} and dtype {targets.dtype}. Cross-entropy takes either "
                "class indices (integers of shape (samples,)) or probabilities (floating-point numbers of shape "
                "(samples, classes))."
                f"{_remedy(targets, samples, classes)}"
            )
        if len(targets) != samples:
            raise BatchError(f"The batch has {samples} rows of logits but {len(targets)} targets.")
        targets = targets.long()  # a smaller type wraps around: in uint8, 156 equals -100
        kept = targets != self.ignore_index
        if not holds(((targets >= 0) & (targets < classes) | ~kept).all()):
            counted = targets[kept]
            span = f"{int(counted.min())}..{int(counted.max())}"
            raise BatchError(
                f"The targets lie in {span}, but the model has {classes} classes (0..{classes - 1}). If one "
                "value means 'no class', give that value as ignore_index=. If labels begin at 1, give targets - 1."
            )
        return None if holds(kept.all()) else kept


# How far the sum of rounded probabilities may be from one, and the logarithm of this sum from zero.
ROUNDED = 1e-2
SEVERAL_LABELS = (
    "Rows of the targets do not sum to one, so they are not probabilities of classes. With loss='cross_entropy', the "
    "weight of a sample is the sum of its row. For several labels per sample, use loss='binary_cross_entropy'. For "
    "regression, use loss='mse'."
)


def _remedy(targets: Tensor, samples: int, classes: int) -> str:
    """Return a sentence on how to convert targets of a wrong shape or type, or ``""`` if no way is known."""
    shape = tuple(targets.shape)
    if shape == (samples, 1) and classes > 1:
        return f" Give targets.squeeze(1){'.long()' if targets.is_floating_point() else ''}."
    if shape == (samples,):
        return " If they are class indices, give targets.long()."
    if shape == (samples, classes):
        return (
            " If they are one-hot, give targets.float(). For several labels per sample use loss='binary_cross_entropy'."
        )
    return ""


@dataclass(frozen=True)
class NegativeLogLikelihood(CrossEntropy):
    """The loss ``torch.nn.NLLLoss``, which takes log-probabilities.

    It is computed as cross-entropy, because ``log_softmax`` leaves log-probabilities unchanged.

    Args:
        label_smoothing: as for :class:`CrossEntropy`; ``torch.nn.NLLLoss`` has none.
        class_weight: weight of every class, ``(K,)``.
        ignore_index: samples with this class index are ignored.

    Example:
        >>> NegativeLogLikelihood()(torch.zeros(1, 4).log_softmax(1), torch.tensor([2])).residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """

    name = "nll"

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at log-probabilities ``(N, K)``."""
        if not holds((logits.double().logsumexp(1).abs() <= ROUNDED).all()):
            raise BatchError(
                "The model does not return log-probabilities, but nn.NLLLoss needs them. If your step applies "
                "log_softmax to the model's output, give loss='cross_entropy'. Otherwise let the model return "
                "torch.log_softmax(logits, 1)."
            )
        return super().__call__(logits, targets)
