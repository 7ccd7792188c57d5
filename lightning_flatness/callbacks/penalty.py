"""The callback FlatnessPenalty, which adds the classifier's flatness to the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.classifier import (
    BY_HAND,
    CallRecorder,
    StepCall,
    called_often,
    find_classifier,
    linear_layers,
    why_not_finite,
)
from lightning_flatness.callbacks.data.sources import BatchFunction, split_by
from lightning_flatness.callbacks.lightning_imports import Callback, LightningModule, Trainer, callbacks_of
from lightning_flatness.callbacks.prefixes import check_prefix
from lightning_flatness.callbacks.rank_errors import RankErrors
from lightning_flatness.checks import as_finite, check_whole, check_word, is_number
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional.loss_argument import find_loss
from lightning_flatness.functional.losses import IGNORED
from lightning_flatness.functional.penalty import PENALTIES, flatness_penalty
from lightning_flatness.layers.certificates.loss import why_not_cross_entropy
from lightning_flatness.measure.batches import targets_of
from lightning_flatness.model.isolation import refuse_sharded


class EagerSteps:
    """A switch that makes compiled modules run eagerly. All FlatnessPenalty callbacks share it.

    Every callback needs eager modules until its first step has ended. So the switch counts these callbacks, and
    restores the earlier setting when the last of them is done.
    """

    _num_steps: ClassVar[int] = 0
    _stance: ClassVar[AbstractContextManager[Any] | None] = None

    @classmethod
    def begin(cls) -> None:
        """Make compiled modules run eagerly from now on."""
        if cls._stance is None:
            cls._stance = torch.compiler.set_stance("force_eager")
            cls._stance.__enter__()
        cls._num_steps += 1

    @classmethod
    def end(cls) -> None:
        """Run compiled modules as before, unless another callback still needs them to run eagerly."""
        cls._num_steps -= 1
        if cls._num_steps == 0 and cls._stance is not None:
            cls._stance.__exit__(None, None, None)
            cls._stance = None


class FlatnessPenalty(Callback):
    """Adds ``λ κ`` to the loss to train towards flat minima. ``κ`` is the classifier's relative flatness.

    ``κ`` is exactly the relative flatness of mean cross-entropy on the batch.
    :func:`~lightning_flatness.functional.flatness_penalty` computes ``κ`` from the input and the output of the
    classifier in the training step, without a second forward or backward pass.

    The classifier is the linear layer whose output is the logits of the loss. The callback finds this layer in the
    first step of a fit. In that step, the callback also checks that the loss has the same second derivative with
    respect to the logits as mean cross-entropy. Later steps are not checked. With ``ignore_index`` or
    class weights, ``κ`` depends on the labels. The callback copies them before every training step, so changes that
    the step makes to them do not matter.

    The callback logs three means over every epoch: ``κ`` as ``penalty/relative_flatness`` (or with the name in
    ``measure=``), ``λ`` as ``penalty/strength``, and the term added to the loss as ``penalty/loss``. It works with
    precision plugins, gradient accumulation, gradient clipping, DDP and ``torch.compile``. With manual optimization,
    call ``flatness_penalty`` in ``training_step`` instead.

    Args:
        strength: ``λ``. Adilova et al. 2023 (arXiv 2307.02337) use 0.1 to 1. With 0, ``κ`` is only logged.
        layers: ``"classifier"``, or the name of one layer. Give a name if the loss takes logits of several layers.
        schedule: a function that takes the number of optimizer steps so far, and returns a finite factor for ``λ``.
        warmup_steps: number of optimizer steps over which ``λ`` rises linearly from zero.
        measure: ``"relative_flatness"`` or ``"layerwise_flatness"``.
        normalize: compute ``κ`` from input features that are divided by their standard deviations over this rank's
            batch, and from weights that are multiplied by these standard deviations.
        maximize: subtract ``λ κ`` instead, to train away from flat minima.
        label_smoothing: label smoothing of your loss. It matters only with class weights.
        class_weight: class weights of your loss, one for every class.
        ignore_index: class index that your loss ignores. This needs the batch's targets.
        batch_fn: a function from a batch to ``(inputs, targets)``. It is needed if the targets are neither the second
            entry of a pair nor an entry with a name like ``label``. The callback does not use the inputs.
        check_loss: False to penalise the flatness of cross-entropy whatever the loss is.
        prefix: prefix of the logged keys.

    Raises:
        FlatnessError: The optimization is manual, weights are sharded, the classifier is not found, or the second
            derivative of the loss is not that of mean cross-entropy. These errors come before or in the first step.
            Also raised in any step that does not call the classifier exactly once with gradients, or where ``schedule``
            returns no finite number.

    Source:
        Petzka et al. 2021 (arXiv 2001.00939); Adilova et al. 2023 (arXiv 2307.02337).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FlatnessPenalty(strength=0.1, warmup_steps=500)], logger=False)
    """

    def __init__(
        self,
        strength: float = 0.1,
        layers: str = "classifier",
        schedule: Callable[[int], float] | None = None,
        warmup_steps: int = 0,
        measure: str = "relative_flatness",
        normalize: bool = False,
        maximize: bool = False,
        label_smoothing: float = 0.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = IGNORED,
        batch_fn: BatchFunction | None = None,
        check_loss: bool = True,
        prefix: str = "penalty",
    ) -> None:
        if not is_number(strength) or not 0 <= strength < math.inf:
            remedy = " To avoid flat minima, use maximize=True." if is_number(strength) and strength < 0 else ""
            raise FlatnessError(f"FlatnessPenalty: strength={strength!r} must be a finite number, at least 0.{remedy}")
        if not isinstance(layers, str) or not layers:
            raise FlatnessError(f"FlatnessPenalty: layers={layers!r} must be 'classifier' or the name of one layer.")
        check_whole("FlatnessPenalty: warmup_steps", warmup_steps, least=0)
        check_word("FlatnessPenalty: measure", measure, PENALTIES)
        find_loss("cross_entropy", label_smoothing, class_weight, ignore_index)  # raises an error for invalid options
        self.strength = strength
        self.layers = layers
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.measure = measure
        self.normalize = normalize
        self.maximize = maximize
        self.batch_fn = batch_fn
        self.check_loss = check_loss
        self.prefix = prefix
        self._options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "class_weight": class_weight,
            "ignore_index": ignore_index,
        }
        self._errors = RankErrors("raise", "FlatnessPenalty", "penalty")
        self._recorder = CallRecorder()
        self._classifier: tuple[str, nn.Module] | None = None  # name and layer, known after the first step
        self._is_eager = False  # whether this callback makes compiled modules run eagerly now
        self._targets: Tensor | None = None  # targets of the batch that is trained on
        # In the first step: the loss without penalties, and the version of the loss with this callback's penalty.
        self._unpenalized: tuple[Tensor, int] | None = None
        self._sums: dict[str, Tensor | float] = {}  # sums of the logged values over the samples of an epoch

    def strength_at(self, step: int) -> float:
        """Return ``λ`` after ``step`` optimizer steps."""
        schedule = self.schedule
        factor = 1.0 if schedule is None else as_finite(f"FlatnessPenalty: schedule({step})", schedule(step))
        return self.strength * factor * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error for manual optimization, an unknown layer name, or a prefix that another callback has."""
        self._release()
        check_prefix(trainer, self)
        if not pl_module.automatic_optimization:
            raise FlatnessError(
                f"FlatnessPenalty works only with automatic optimization, and {type(pl_module).__name__} optimizes "
                f"manually. Use automatic optimization. {BY_HAND}"
            )
        linear_layers(pl_module, self.layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if weights are sharded."""
        for name, module in pl_module.named_modules():
            refuse_sharded(name, module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to record the calls of the classifier.

        In the first step of a fit, compiled modules run eagerly, and calls of all possible classifiers are recorded.
        """
        with _named():
            targets = targets_of(batch) if self.batch_fn is None else split_by(self.batch_fn, batch)[1]
        self._targets = None if targets is None else targets.clone()  # the step may change them
        if self._classifier is None:
            self._recorder.attach(linear_layers(pl_module, self.layers))
            if not self._is_eager:
                self._is_eager = True
                EagerSteps.begin()
        self._recorder.listen(True)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add ``λ κ`` to the loss, in place."""
        calls = self._recorder.take()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unpenalized: Tensor | None = None
        if self._classifier is None:
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            unpenalized = _without_penalties(trainer, loss)
            self._find_classifier(trainer, pl_module, calls, unpenalized, scale / trainer.accumulate_grad_batches)
        assert self._classifier is not None
        name, layer = self._classifier
        calls = [call for call in calls if call.name == name]
        if len(calls) != 1:
            raise FlatnessError(_not_once(name, len(calls)))
        strength = self.strength_at(trainer.global_step)
        with torch.set_grad_enabled(strength != 0):
            flatness = self._flatness(calls[0], layer)
            added = (-strength if self.maximize else strength) * flatness
            if strength != 0:
                # Lightning has divided and scaled the loss already, so do the same with what is added.
                part = added / trainer.accumulate_grad_batches
                loss.add_((part if scaler is None else scaler.scale(part)).to(loss))
                self._unpenalized = None if unpenalized is None else (unpenalized, loss._version)
        samples = len(calls[0].logits)
        values: dict[str, Tensor | float] = {self.measure: flatness.detach(), "loss": added.detach()}
        for key, value in {**values, "strength": strength, "samples": 1.0}.items():
            self._sums[key] = self._sums.get(key, 0.0) + samples * value

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the sums from which the epoch's averages are logged."""
        self._sums = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the epoch. Logging in every step would take longer than the penalty itself."""
        samples = self._sums.pop("samples", 0.0)
        for key, total in self._sums.items():
            pl_module.log(f"{self.prefix}/{key}", total / samples, sync_dist=trainer.world_size > 1, batch_size=1)
        self._sums = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record calls again, because an optimizer may run the training step several times."""
        self._recorder.listen(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop recording calls."""
        self._recorder.listen(False)
        self._targets = self._unpenalized = None
        self._leave_eager()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._release()

    def _release(self) -> None:
        self._recorder.detach()
        self._classifier = self._targets = self._unpenalized = None
        self._leave_eager()

    def _leave_eager(self) -> None:
        if self._is_eager:
            EagerSteps.end()
        self._is_eager = False

    def _find_classifier(
        self, trainer: Trainer, pl_module: LightningModule, calls: Sequence[StepCall], loss: Tensor, scale: float
    ) -> None:
        """Find the classifier in the calls of the first step. From now on, record the calls of this layer alone."""
        layers = linear_layers(pl_module, self.layers)

        def why_not(call: StepCall) -> str:
            if not self.check_loss:
                return "" if _depends(loss, call.logits) else "the loss does not depend on it"
            with _named():
                return why_not_cross_entropy(loss, call.logits, self._targets_for(call), scale, **self._options)

        with self._errors.kept(trainer.world_size):
            try:
                name = find_classifier(calls, layers, why_not)
            except FlatnessError as error:
                reason = why_not_finite(calls, loss.detach())
                if reason:
                    raise FlatnessError(reason) from error
                raise
            self._flatness(next(call for call in calls if call.name == name), layers[name])  # to raise its errors now
            self._classifier = name, layers[name]
            self._recorder.attach({name: layers[name]})
        self._errors.settle("the first training step")

    def _targets_for(self, call: StepCall) -> Tensor | None:
        """Return the batch's targets if the penalty needs them, or None otherwise.

        With class weights, the penalty always needs the targets. Without class weights, it needs them only if they are
        class indices, some of which may be ignored. Other targets, such as class probabilities, are assumed to sum to
        one for every sample, so they are not needed.
        """
        targets = self._targets
        if targets is None or self._options["class_weight"] is not None:
            return targets
        are_indices = targets.shape == call.logits.shape[:1] and not targets.is_floating_point()
        return targets if are_indices else None

    def _flatness(self, call: StepCall, layer: nn.Module) -> Tensor:
        weight = call.applied(layer, "weight")
        assert weight is not None
        options = {"measure": self.measure, "normalize": self.normalize, **self._options}
        with _named():
            return flatness_penalty(call.features, call.logits, weight, self._targets_for(call), **options)


@contextmanager
def _named() -> Iterator[None]:
    """Add the callback's name to errors about a batch. If targets are the problem, add a remedy, too."""
    try:
        yield
    except BatchError as error:
        lacks_targets = "targets" in str(error) and "batch_fn=" not in str(error)
        remedy = " Give batch_fn=, a function from a batch to (inputs, targets)." if lacks_targets else ""
        raise BatchError(f"FlatnessPenalty: {error}{remedy}") from error


def _without_penalties(trainer: Trainer, loss: Tensor) -> Tensor:
    """Return the loss as it was before other FlatnessPenalty callbacks added their penalties in this step.

    If there are no such penalties, or something has changed the loss after them, return a copy of the present loss.
    """
    others = [other._unpenalized for other in callbacks_of(trainer) if isinstance(other, FlatnessPenalty)]
    kept = [unpenalized for unpenalized, version in filter(None, others) if version == loss._version]
    return kept[0] if kept else loss.clone()  # a copy, since the penalty is added in place


def _depends(loss: Tensor, logits: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None


def _not_once(name: str, number: int) -> str:
    if number:
        return f"FlatnessPenalty: {called_often(name, number)}"
    return (
        f"FlatnessPenalty did not see a call of '{name}' with gradients in this training step. If torch.compile has "
        "compiled the network before the fit, the compiled code ignores the callback's hook. Then call "
        f"torch.compiler.reset() before the fit. If some steps do not use this layer's logits, {BY_HAND[3:]}"
    )
