"""The ``loss=`` argument: turn a name, a torch module or the user's function into a loss with derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import combinations, count
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_flatness.checks import as_number, check_class_weight, check_whole
from lightning_flatness.errors import BatchError, FlatnessError, is_out_of_memory
from lightning_flatness.functional.autocast import WithoutAutocast
from lightning_flatness.functional.autograd_curvature import AutogradCurvature, Curvature, certified_diagonal, product
from lightning_flatness.functional.curvature import MANY_CLASSES, ClassCurvature, DenseCurvature
from lightning_flatness.functional.graph_walk import differentiable_once, says_no_second_derivative
from lightning_flatness.functional.loss_calls import Compared, compare
from lightning_flatness.functional.loss_labels import with_hash
from lightning_flatness.functional.losses import CrossEntropy, Loss, LossDerivatives, NegativeLogLikelihood, outcomes_of
from lightning_flatness.functional.losses_of_outputs import BinaryCrossEntropy, MeanSquaredError
from lightning_flatness.functional.torch_losses import PerSample, takes_a_mean

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)}


def find_loss(
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor],
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
) -> Loss:
    """Return the loss that a name, module or function stands for.

    Names are ``"cross_entropy"``, ``"binary_cross_entropy"`` and ``"mse"``. Modules are ``nn.CrossEntropyLoss``,
    ``nn.NLLLoss``, ``nn.MSELoss``, and those of :mod:`~lightning_flatness.functional.torch_losses`. The reduction of
    all these modules must be the mean. A function or another module becomes a :class:`CustomLoss`. The other arguments
    are options of ``"cross_entropy"``; see :class:`CrossEntropy`.

    Args:
        loss: a name, module or function as above, or a :class:`Loss`, which is returned (a :class:`CustomLoss` as a
            copy).
        label_smoothing: label smoothing of cross-entropy.
        class_weight: class weights of cross-entropy, ``(K,)``.
        ignore_index: target value that cross-entropy ignores.

    Raises:
        FlatnessError: the loss is not known or has options that cannot be used.

    Example:
        >>> find_loss("cross_entropy", label_smoothing=0.1)
        CrossEntropy(label_smoothing=0.1, class_weight=None, ignore_index=-100)
    """
    options = label_smoothing != 0 or class_weight is not None or ignore_index != -100
    if options and loss != "cross_entropy":
        raise FlatnessError(
            "label_smoothing, class_weight and ignore_index are options of loss='cross_entropy' only. With another "
            "loss, give loss= a torch module with its own options, e.g. nn.CrossEntropyLoss(label_smoothing=0.1), or "
            "a function from (logits, targets) to the loss of every sample."
        )
    if isinstance(loss, CustomLoss):
        return loss.uncompared()
    if isinstance(loss, Loss):
        return loss
    if type(loss) is nn.CrossEntropyLoss:
        return _cross_entropy(_mean(loss).label_smoothing, loss.weight, loss.ignore_index)
    if type(loss) is nn.NLLLoss:
        options_of_torch = _cross_entropy(0.0, _mean(loss).weight, loss.ignore_index)
        return NegativeLogLikelihood(0.0, options_of_torch.class_weight, options_of_torch.ignore_index)
    if type(loss) is nn.MSELoss:
        _mean(loss)
        return MeanSquaredError()
    if type(loss) is nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None:
        _mean(loss)
        return BinaryCrossEntropy()
    if takes_a_mean(loss):
        return CustomLoss(PerSample(loss))
    if loss == "cross_entropy":
        return _cross_entropy(label_smoothing, class_weight, ignore_index)
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    if isinstance(loss, type):
        module = "nn." if loss.__module__.startswith("torch.nn.") else ""
        raise FlatnessError(f"loss={module}{loss.__name__} is a class: give an instance, {module}{loss.__name__}().")
    if isinstance(loss, str) or not callable(loss):
        raise FlatnessError(
            f"loss={loss!r} is not known. Choose one of {', '.join(map(repr, LOSSES))}, or give a function from "
            "(logits, targets) to the loss of every sample."
        )
    parameters = [name for name, _ in loss.named_parameters()] if isinstance(loss, nn.Module) else []
    if parameters:
        warnings.warn(
            f"loss={type(loss).__name__} holds parameters ({', '.join(parameters[:3])}). They count as constants, "
            "because only layers of the model are measured. To measure them too, move them into the model, e.g. "
            "nn.Sequential(model, head), and give a loss that takes the output of that model.",
            stacklevel=2,
        )
    return CustomLoss(loss)


def _cross_entropy(
    label_smoothing: float, class_weight: Sequence[float] | Tensor | None, ignore_index: int
) -> CrossEntropy:
    smoothing = as_number(label_smoothing)
    if smoothing is None or not 0 <= smoothing <= 1:
        raise FlatnessError(f"label_smoothing={label_smoothing!r} must be a number between 0 and 1.")
    check_whole("ignore_index", ignore_index)
    check_class_weight(class_weight)
    try:
        weight = None if class_weight is None else tuple(float(value) for value in class_weight)
    except (TypeError, ValueError):
        weight = (-1.0,)
    if weight is not None and not all(0 <= value < float("inf") for value in weight):
        raise FlatnessError("class_weight must contain one number for every class, each finite and not negative.")
    return CrossEntropy(smoothing, weight, ignore_index)


def _mean(loss: nn.CrossEntropyLoss | nn.NLLLoss | nn.MSELoss | nn.BCEWithLogitsLoss) -> Any:
    if loss.reduction != "mean":
        raise FlatnessError(
            f"loss={type(loss).__name__}(reduction={loss.reduction!r}) is not a mean over samples, but flatness "
            "is measured for the mean loss. Use reduction='mean'."
        )
    return loss


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A loss written by the user; autograd computes its derivatives.

    The function maps ``(logits, targets)`` to the loss of every sample, ``(N,)``; the measured loss is the mean over
    samples. The loss of a sample must not depend on other samples, on its place among them, on their number, or on
    random numbers. The function may be called with float64 logits, and with only a part of a batch.

    The second derivative is stored in the form that takes the least time and memory. If it is a diagonal matrix without
    negative entries (as for the squared error), its ``K`` diagonal entries are stored for every sample. Otherwise, with
    fewer than 128 classes, the ``K x K`` matrix is stored for every sample. With 128 classes or more, no matrix is
    stored, and autograd computes products with the second derivative.

    Args:
        function: maps logits ``(N, K)`` and targets to the loss of every sample, ``(N,)``.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> loss = CustomLoss(lambda f, y: cross_entropy(f, y, reduction="none"))
        >>> loss(torch.zeros(1, 4), torch.tensor([2])).residual
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]], dtype=torch.float64)
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_label", with_hash(self.name, self.function))
        object.__setattr__(self, "_compared", Compared())

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the function, or of its class if it has no name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def label(self) -> str:
        """The name, plus a hash of the code, options and initial tensors if other losses may share the name."""
        return str(vars(self)["_label"])

    def uncompared(self) -> CustomLoss:
        """Return a copy for another measurement, which compares calls of the function by itself."""
        copied = copy(self)
        object.__setattr__(copied, "_compared", Compared())
        return copied

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> LossDerivatives:
        """Compute the derivatives of the loss at ``logits`` ``(N, K)``."""
        if targets is None:
            raise BatchError(f"The loss '{self.name}' needs targets, but this batch has none.")
        with torch.enable_grad(), self._naming_what_has_no_derivative():
            f, losses = self._losses(logits.detach(), targets)
            self._check_shape(losses, len(f))
            self._check_calls_agree(losses.detach(), f.detach(), targets)
            ones = torch.ones_like(losses, requires_grad=True)  # so that differentiable_once can find error nodes
            (residual,) = torch.autograd.grad(losses, f, ones, create_graph=True)
            if not bool(residual.isfinite().all()):
                raise BatchError(
                    f"A derivative of the loss '{self.name}' is not finite. A likely cause is a square root or "
                    "logarithm at zero. Add an epsilon there."
                )
            if differentiable_once([residual]):
                raise self._no_second_derivative("a custom function is marked once_differentiable")
            self._check_samples_are_separate(losses, f)
            curvature = self._curvature(f, residual, targets)
        outcomes = outcomes_of(losses.detach(), logits, targets)
        return LossDerivatives(curvature, residual.detach().double(), len(f), float(len(f)), outcomes)

    @contextmanager
    def _naming_what_has_no_derivative(self) -> Iterator[None]:
        """In a ``with`` block, explain errors that PyTorch raises because it cannot differentiate the loss twice."""
        try:
            yield
        except RuntimeError as error:  # NotImplementedError is a subclass
            if not says_no_second_derivative(error):
                raise
            raise self._no_second_derivative(str(error)) from error

    def _no_second_derivative(self, reason: str) -> FlatnessError:
        """Return an error that says why the loss has no second derivative, and what the user can do."""
        return FlatnessError(
            f"The loss '{self.name}' has no second derivative in PyTorch ({reason}), but the Hessian needs one. "
            "Write the loss with operations that have a second derivative, such as gather, clamp, exp and log."
        )

    def _curvature(self, f: Tensor, residual: Tensor, targets: Tensor) -> Curvature:
        """Return the second derivative at the logits ``f``, stored as :class:`CustomLoss` says.

        ``residual`` is the gradient of the loss with respect to ``f``, with its autograd graph.
        """
        diagonal = certified_diagonal(residual, f)
        if diagonal is not None and bool((diagonal >= 0).all()):
            return ClassCurvature(diagonal)
        if f.shape[1] >= MANY_CLASSES:
            return AutogradCurvature(self._called, f.detach(), targets)
        units = torch.eye(f.shape[1], dtype=torch.float64, device=f.device)
        matrices = torch.stack([product(residual, f, unit.expand_as(f)) for unit in units], dim=1)
        return DenseCurvature.of((matrices + matrices.mT) / 2)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = self._called(logits, targets)
        return losses.double().sum()

    def _called(self, logits: Tensor, targets: Tensor) -> Any:
        """Call the function without autocast, with a copy of the targets.

        A module is called with copies of its tensors. Copies of floating-point tensors have the dtype of the logits.
        """
        targets = targets.clone()
        if not isinstance(self.function, nn.Module):
            with WithoutAutocast():
                return self.function(logits, targets)
        named = {**dict(self.function.named_parameters()), **dict(self.function.named_buffers())}
        copies = {
            name: tensor.detach().to(logits.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in named.items()
        }
        with WithoutAutocast():
            return functional_call(self.function, copies, (logits, targets))

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """Return a copy of the logits that requires a gradient, and the losses of all samples at this copy.

        The copy is float64, or has the dtype of the logits if the function fails on float64.
        """
        first_error: Exception | None = None
        for dtype in dict.fromkeys((torch.float64, logits.dtype)):
            f = logits.to(dtype, copy=True).requires_grad_()
            try:
                return f, self._called(f, targets)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                first_error = first_error or error
        raise BatchError(
            f"The loss '{self.name}' fails on logits of shape {tuple(logits.shape)} and targets of shape "
            f"{tuple(targets.shape)}: {type(first_error).__name__}: {first_error}"
        ) from first_error

    def _check_shape(self, losses: Any, samples: int) -> None:
        if not isinstance(losses, Tensor) or losses.shape != (samples,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise BatchError(
                f"The loss '{self.name}' returns {shape} for {samples} samples. It must return one loss per sample, "
                f"a tensor of shape (samples,). For a mean loss of torch, give loss={' or '.join(map(repr, LOSSES))}. "
                "With another loss of torch, use reduction='none', and average over all dimensions but the first."
            )
        if not losses.requires_grad:
            raise BatchError(
                f"The loss '{self.name}' has no gradient with respect to the logits: the function does not use them, "
                "or it detaches them."
            )

    def _check_calls_agree(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Raise an error if further calls of the function, on all samples or on parts of them, give other losses.

        Calls are compared on one batch in sixteen, and on a batch with more samples than any before. They are compared
        on every batch as long as all samples of each have had the same target.
        """
        compared: Compared = vars(self)["_compared"]
        if compared.suffices(len(logits)):
            object.__setattr__(self, "_compared", compared.again())
            return
        comparison = compare(self._called_without_graph, losses, logits, targets)
        if comparison.is_random:
            raise FlatnessError(
                f"The loss '{self.name}' is random: two calls with the same logits and targets give different losses. "
                "Switch off its dropout or noise; for a module, call loss.eval()."
            )
        if comparison.is_mixing:
            raise self._depends_on_others()
        if comparison.targets_differ:
            object.__setattr__(self, "_compared", compared.having(len(logits)))

    def _called_without_graph(self, logits: Tensor, targets: Tensor) -> Any:
        """Call the function with detached logits; autograd records the call only if the function needs that."""
        try:
            with torch.no_grad():
                return self._called(logits, targets)
        except RuntimeError:  # the function differentiates its logits itself
            return self._called(logits.detach().requires_grad_(), targets)

    def _check_samples_are_separate(self, losses: Tensor, logits: Tensor) -> None:
        for mask in separating_masks(len(logits)).to(logits.device):
            (gradient,) = torch.autograd.grad(losses[mask].sum(), logits, retain_graph=True)
            if bool(gradient[~mask].any()):
                raise self._depends_on_others()

    def _depends_on_others(self) -> BatchError:
        return BatchError(
            f"The loss '{self.name}' of a sample depends on other samples of its batch, or on its place among them. "
            "Examples are a contrastive loss, batch statistics, one weight for every place, and a division by the "
            "number of samples or the sum of their weights. Give a loss that computes the loss of every sample from "
            "the logits and the target of this sample alone. For the weighted mean of cross-entropy, give "
            "loss='cross_entropy' with class_weight=."
        )


def separating_masks(samples: int) -> Tensor:
    """Choose masks ``(M, N)`` such that for any two samples ``i`` and ``j``, some mask contains ``i`` but not ``j``.

    Every sample is in ``M // 2`` masks, and any two samples are in different sets of masks. Sets of equal size that
    differ never contain each other. ``M`` is about ``log2(N) + 2``; by Sperner's theorem, fewer masks are not enough.

    Args:
        samples: ``N``, the number of samples.

    Returns:
        The masks, bool ``(M, N)``, on the CPU.

    Source:
        Sperner 1928.

    Example:
        >>> separating_masks(5).int()
        tensor([[1, 1, 1, 0, 0],
                [1, 0, 0, 1, 1],
                [0, 1, 0, 1, 0],
                [0, 0, 1, 0, 1]], dtype=torch.int32)
    """
    number = next(m for m in count() if comb(m, m // 2) >= samples)
    masks = torch.zeros(number, samples, dtype=torch.bool, device="cpu")
    for sample, chosen in zip(range(samples), combinations(range(number), number // 2)):  # noqa: B905
        masks[list(chosen), sample] = True
    return masks
