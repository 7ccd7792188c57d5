"""The ``loss=`` argument: from a name, a module of torch or a function to a loss with derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_flatness.checks import check_whole
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional.custom_loss import CustomLoss
from lightning_flatness.functional.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)}


def find_loss(
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor],
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
) -> Loss:
    """Find the loss that a user names, or gives as a module or function.

    Args:
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``; ``nn.CrossEntropyLoss``, ``nn.MSELoss`` or
            ``nn.BCEWithLogitsLoss`` without weights, with the mean as their reduction; or a function from ``(logits,
            targets)`` to the loss of every sample, ``(N,)``.
        label_smoothing: option of ``"cross_entropy"``; see :class:`CrossEntropy`.
        class_weight: likewise, ``(K,)``.
        ignore_index: likewise.

    Raises:
        FlatnessError: the loss is unknown, or does not have the options given.

    Example:
        >>> find_loss("cross_entropy", label_smoothing=0.1)
        CrossEntropy(label_smoothing=0.1, class_weight=None, ignore_index=-100)
    """
    options = label_smoothing != 0 or class_weight is not None or ignore_index != -100
    if options and loss != "cross_entropy":
        raise FlatnessError(
            "label_smoothing, class_weight and ignore_index are options of loss='cross_entropy'. Give another loss "
            "with its options as a function from (logits, targets) to the loss of every sample."
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
            f"loss={loss!r} is not known. Choose one of {', '.join(map(repr, LOSSES))}, or give a function from "
            "(logits, targets) to the loss of every sample."
        )
    return CustomLoss(loss)


def _cross_entropy(smoothing: float, class_weight: Sequence[float] | Tensor | None, ignore_index: int) -> CrossEntropy:
    if not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= 1:
        raise FlatnessError(f"label_smoothing={smoothing} must lie between 0 and 1.")
    check_whole("ignore_index", ignore_index)
    try:
        weight = None if class_weight is None else tuple(float(value) for value in class_weight)
    except (TypeError, ValueError):
        weight = (-1.0,)
    if weight is not None and not all(0 <= value < float("inf") for value in weight):
        raise FlatnessError("class_weight must be a number for every class, each finite and not negative.")
    return CrossEntropy(smoothing, weight, ignore_index)


def _mean(loss: nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss) -> Any:
    if loss.reduction != "mean":
        raise FlatnessError(
            f"loss={type(loss).__name__}(reduction={loss.reduction!r}): flatness is measured of a mean over samples; "
            "use reduction='mean'."
        )
    return loss
