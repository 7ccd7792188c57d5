"""The sources of the samples to measure: the validated batches, training data, or the user's own batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.data.loaders import batch_size_of, is_indexed, loaders_in_turn
from lightning_flatness.callbacks.data.reading import first_batch, to_device
from lightning_flatness.callbacks.data.stream import ValidationStream
from lightning_flatness.callbacks.data.subset import FixedSubset, training_subset
from lightning_flatness.checks import is_sequence
from lightning_flatness.errors import BatchError
from lightning_flatness.measure.batches import called, rivals_of, split_batch, targets_of
from lightning_flatness.measure.samples import none_left
from lightning_flatness.model.call import Call, as_call, equal_inputs, heard_call, map_tensors, tensors_of
from lightning_flatness.model.isolation import random_states_kept
from lightning_flatness.model.rows import is_reordered, num_rows

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer

Samples = tuple[Any, Tensor | None]
BatchFunction = Callable[[Any], Samples]


def split_by(batch_fn: BatchFunction, batch: Any) -> Samples:
    """Split a batch into ``(inputs, targets)`` with ``batch_fn``. Raise an error if it returns anything else."""
    pair = called(batch_fn, batch)
    if not is_sequence(pair) or len(pair) != 2:
        raise BatchError(
            f"batch_fn=... returned a {type(pair).__name__}; it must return (inputs, targets), with None in place of "
            "missing targets."
        )
    inputs, targets = pair
    if targets is not None and not isinstance(targets, Tensor):
        kind = type(targets).__name__
        raise BatchError(f"batch_fn=... returned targets of type {kind}; they must be a tensor, or None.")
    return inputs, targets


@dataclass(frozen=True)
class Wanted:
    """What the user wants to measure.

    Attributes:
        data: ``"val"`` for the validated batches, ``"train"`` for training data, or the user's own batches.
        max_samples: number of samples over all ranks; None for the default.
        batch_fn: the user's function from a batch to ``(inputs, targets)``, or None.
    """

    data: str | Iterable[Any]
    max_samples: int | None
    batch_fn: BatchFunction | None

    def split(self, batch: Any) -> Samples:
        """Split a batch into ``(inputs, targets)``, with ``batch_fn`` if there is one."""
        return split_batch(batch) if self.batch_fn is None else split_by(self.batch_fn, batch)

    def measures(self, trainer: Trainer) -> bool:
        """Return whether the batches of the current loop, training or validation, are those to measure."""
        return isinstance(self.data, str) and self.data == ("train" if trainer.training else "val")

    def before_step(self, batch: Any, model: nn.Module, copies: bool = False, is_measured: bool = True) -> Asked:
        """Read inputs and targets from a batch before the step that gets it, because the step may change them.

        If ``copies``, also copy the inputs. Targets are always copied. On a batch that is not measured, ``batch_fn``
        may fail.
        """
        if _is_empty(batch):
            return Asked(None, None, is_empty=True)
        if self.batch_fn is not None:
            with nullcontext() if is_measured else suppress(BatchError), random_states_kept(model):
                inputs, targets = self.split(map_tensors(batch, torch.clone))
                is_empty = inputs is None and targets is None
                return Asked(inputs, targets, copied=inputs, is_given=inputs is not None, is_empty=is_empty)
        try:
            inputs, why = split_batch(batch)[0], ""
        except BatchError as error:
            inputs, why = None, str(error)
        targets = targets_of(batch)
        copied = as_call(inputs).copied() if copies else None
        others = [tensor for tensor in tensors_of(batch) if tensor is not targets]
        targets = None if targets is None else targets.clone()
        return Asked(inputs, targets, copied, why, rivals=rivals_of(batch), others=others)


@dataclass(frozen=True)
class Asked:
    """The inputs and targets of a batch, as they were before its validation or training step."""

    inputs: Any  # None if unknown; measured only if is_given, or if no call of the network was recorded
    targets: Tensor | None
    copied: Any = None  # copies of the inputs, which the step cannot change; None if they are not needed
    why_no_targets: str = ""  # why the batch could not be split into inputs and targets; empty if it was split
    is_given: bool = False  # whether inputs come from batch_fn=
    is_empty: bool = False  # whether the batch has no samples; then the step may skip it
    rivals: Sequence[Tensor] = ()  # tensors of the batch that may be the targets instead
    others: Sequence[Tensor] = ()  # tensors of the batch besides the targets; empty with batch_fn=

    def own_call(self) -> Call:
        """Return the call of the network with :attr:`inputs` as arguments. Raise an error if the inputs are unknown."""
        if self.inputs is None:
            problem = (
                "batch_fn= gives no inputs, and the validation step was not seen to call the network. Return inputs "
                "from batch_fn=, too."
            )
            raise BatchError(self.why_no_targets or problem)
        return as_call(self.inputs)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """If the ``with`` block raises an error about missing targets, add the reason why the batch has none."""
        try:
            yield
        except BatchError as error:
            said = str(error)
            if self.targets is None and self.why_no_targets not in said and "target" in said:
                raise BatchError(
                    f"{error} {self.why_no_targets} If batch_fn= returns (None, targets), the inputs are still those "
                    "that the validation step gives to the network."
                ) from error
            raise

    def samples(self, call: Call, is_own: bool = False) -> Samples:
        """Return ``(inputs, targets)`` to measure. Inputs are those of ``call`` unless ``batch_fn=`` gives others.

        ``is_own`` says that ``call`` is known to be on the very inputs of the batch. Then they are not compared.

        Raises:
            BatchError: It is not certain which tensor has the targets, or which targets belong to which samples.
        """
        self.refuse_doubtful(call)
        if self.targets is not None and not is_own:
            self._refuse_reordered(call, self.targets)
        differ = self.is_given and not equal_inputs(call, as_call(self.inputs))
        return (as_call(self.inputs) if differ else call), self.targets

    def refuse_doubtful(self, call: Call) -> None:
        """Raise a :class:`BatchError` if it is not certain which tensor of the batch has the targets.

        It is certain in two cases. Either ``call`` gives the network every other tensor that may have the targets. Or
        ``call`` gives the network as many tensors as the batch has besides :attr:`targets`.
        """
        given = [tensor for tensor in tensors_of(call) if not equal_inputs(tensor, self.targets)] if self.rivals else []
        if len(given) < len(self.others) and not all(_is_among(rival, given) for rival in self.rivals):
            raise BatchError(
                "It is not certain which tensor of the batch has the targets: several tensors may have them, and the "
                "network does not get all the others. Give batch_fn=, a function from a batch to (inputs, targets). "
                "With data='val', batch_fn= of FlatnessCallback may return (None, targets); the inputs are then those "
                "of the validation step."
            )

    def _refuse_reordered(self, call: Call, targets: Tensor) -> None:
        """Raise a :class:`BatchError` if ``call`` gives the network the samples of the batch in another order.

        If the network gets any tensor of the batch in its order, the samples have this order.
        """
        called = tensors_of(call)
        dense = [other for other in self.others if other.ndim and not other.is_nested]
        others = [other for other in dense if targets.ndim and len(other) == len(targets)]
        pairs = [(one, other) for one in called for other in others if is_reordered(one, other)]
        if any(not _is_among(one, [*others, targets]) for one, _ in pairs) and not _is_any_among(others, called):
            raise BatchError(
                "The validation step gives the network the batch's samples in another order, so it is not certain "
                "which targets belong to them. Give batch_fn=, a function from a batch to (inputs, targets). It may "
                "return (None, targets), with the targets in the order of the step; the inputs are then those of the "
                "validation step."
            )


def _is_among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(equal_inputs(tensor, other) for other in others)


def _is_any_among(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return any(_is_among(tensor, others) for tensor in tensors)


def _is_empty(batch: Any) -> bool:
    """Return whether a batch has no samples: it is None, a tensor without entries, or a collection of such."""
    if isinstance(batch, Mapping):
        return all(map(_is_empty, batch.values()))
    if is_sequence(batch):
        return all(map(_is_empty, batch))
    return batch is None or (isinstance(batch, Tensor) and batch.ndim > 0 and not len(batch))


class ValidationBatches:
    """The validated batches as a source of samples. Samples that a ``DistributedSampler`` repeats are left out.

    Args:
        trainer: the Trainer that validates.
        wanted: what the user wants to measure.
        loader: the validated loader; None if Lightning combines several loaders.
        num_batches: the number of batches that Lightning validates; infinite if unknown.

    Attributes:
        why_not_observed: reason why extra forward passes must be made, or an empty string if those of the validation
            steps can be used. With ``max_samples=`` they cannot, because only parts of batches are measured.
    """

    def __init__(self, trainer: Trainer, wanted: Wanted, loader: Any | None, num_batches: float) -> None:
        ranks = trainer.global_rank, trainer.world_size
        self._stream = ValidationStream(loader, num_batches, wanted.max_samples, *ranks)
        self.why_not_observed = "" if wanted.max_samples is None else "max_samples= takes parts of batches"
        # Positions of the samples that the latest mask selects, among the measured samples of all ranks.
        self.positions: Tensor | None = None
        self._num_batches, self._batch_size, self._num_ranks = num_batches, batch_size_of(loader), trainer.world_size

    def is_last(self, batch_idx: int) -> bool:
        """Return whether this batch is the last one; False if the number of batches is unknown."""
        return batch_idx + 1 >= self._num_batches

    def is_due(self, batch: Any, batch_idx: int) -> bool:
        """Return whether ranks that have not failed have measured all of the first samples after this batch."""
        rows = self._batch_size or num_rows(batch)
        order = self._stream.order(rows, batch_idx)
        if order is None:
            order = (torch.arange((batch_idx + 1) * rows, device="cpu") * self._num_ranks)[-1:]
        else:
            order = order[self._stream.mask(rows, batch_idx)]
        return none_left(order, self._num_ranks)

    def mask(self, samples: Samples, batch_idx: int) -> Tensor:
        """Return a Boolean mask ``(N,)`` that is True for the samples to measure in a validated batch."""
        rows = num_rows(*samples)
        mask, order = self._stream.mask(rows, batch_idx), self._stream.order(rows, batch_idx)
        self.positions = None if order is None else order[mask]
        return mask

    def rest(self) -> Iterator[Samples]:
        """Return an empty iterator, because every sample was measured right after its validation step."""
        return iter(())


class SeparateData:
    """A source that reads training data or the user's own batches, separately from the validated batches.

    The callback measures an equal part of this source after each validated batch, so that the progress bar of
    validation shows the true progress.

    Args:
        trainer: the Trainer that validates.
        pl_module: the LightningModule, for its transfer hooks and devices.
        wanted: what the user wants to measure.
        loaders: the validated loaders; None if there is no validation.
        num_batches: for each loader, the number of batches that Lightning validates.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        wanted: Wanted,
        loaders: Any = None,
        num_batches: Sequence[float] = (),
    ) -> None:
        share = trainer.global_rank, trainer.world_size
        loader = trainer.train_dataloader if isinstance(wanted.data, str) else wanted.data
        most, batch_size = wanted.max_samples, batch_size_of(loader)
        if getattr(trainer, "fast_dev_run", False) and batch_size is not None:  # as many batches as are trained on
            of_run = int(trainer.num_training_batches) * batch_size * trainer.world_size
            most = of_run if most is None else min(most, of_run)
        if isinstance(wanted.data, str):
            subset = training_subset(loader, most, *share, trainer.num_training_batches)
        else:
            subset = FixedSubset(loader, most, *share)
        self._trainer, self._pl_module, self._wanted = trainer, pl_module, wanted
        self._batches = subset.batches(pl_module)
        self._num_batches = subset.num_batches
        self._num_read = 0
        self.num_validated = 0  # number of validated batches before the latest one
        self._share, self._is_indexed = share, subset.is_indexed
        self._batch_size, self._batch_rows = batch_size, 0  # of the loader, if known, and of the first batch
        # Positions of the latest samples among those of all ranks; None if the ranks take turns sample by sample.
        self.positions: Tensor | None = None
        in_turn = loaders_in_turn(trainer, loaders)
        # If the number of validated batches is not known in advance, all samples are measured after the first batch.
        self._num_to_validate = sum(num_batches) if in_turn and all(map(is_indexed, in_turn)) else 1

    def is_last(self, batch_idx: int) -> bool:
        """Return whether this is the last validated batch, so that :meth:`after_step` returns the last part."""
        return self.num_validated + 1 >= self._num_to_validate

    def is_due(self, batch: Any, batch_idx: int) -> bool:
        """Return whether ranks that have not failed have read all of the first samples after a validated batch."""
        num_read = self._batches_due() * (self._batch_size or self._batch_rows or num_rows(batch))
        num_ranks = self._share[1]
        return num_read > 0 and none_left(torch.tensor([(num_read - 1) * num_ranks], device="cpu"), num_ranks)

    def after_step(self) -> Iterator[Samples]:
        """Return an iterator over the next part of this source's samples. Call this once after each validated batch."""
        return self.rest() if self.is_last(self.num_validated) else self._read_until(self._batches_due())

    def _batches_due(self) -> int:
        fraction = (self.num_validated + 1) / self._num_to_validate
        return 0 if math.isinf(self._num_batches) else math.ceil(self._num_batches * fraction)

    def rest(self) -> Iterator[Samples]:
        """Return an iterator over the samples that were not read yet. Without validation, these are all samples."""
        return self._read_until(math.inf)

    def _read_until(self, goal: float) -> Iterator[Samples]:
        while self._num_read < goal and (batch := next(self._batches, self)) is not self:
            samples = self._wanted.split(to_device(self._trainer, self._pl_module, batch))
            if not self._is_indexed:  # the ranks take turns with batches
                rows, (rank, num_ranks) = num_rows(*samples), self._share
                self._batch_rows = self._batch_rows or rows
                first = (self._num_read * num_ranks + rank) * self._batch_rows
                self.positions = torch.arange(first, first + rows, device="cpu")
            self._num_read += 1
            yield samples


def sources_of(
    trainer: Trainer, pl_module: LightningModule, wanted: Wanted, loaders: Any, num_batches: Sequence[float]
) -> Sequence[ValidationBatches | SeparateData]:
    """Return the sources of a validation.

    If the validated batches are measured, each loader has its own source. Loaders that Lightning combines share one
    source. Training data, or the user's own batches, are one source, too.
    """
    if not (isinstance(wanted.data, str) and wanted.data == "val"):
        return [SeparateData(trainer, pl_module, wanted, loaders, num_batches)]
    in_turn = loaders_in_turn(trainer, loaders)
    if not in_turn or len(in_turn) != len(num_batches):
        return [ValidationBatches(trainer, wanted, None, num_batches[0] if len(num_batches) == 1 else math.inf)]
    pairs = zip(in_turn, num_batches, strict=True)
    return [ValidationBatches(trainer, wanted, loader, number) for loader, number in pairs]


def first_samples(trainer: Trainer, pl_module: LightningModule, wanted: Wanted) -> Samples | None:
    """Read one batch of the data to measure, before training begins and without changing the user's loader.

    Return its inputs and targets. Return None if this rank has no samples, if Lightning has not set up validation yet,
    or if no batch can be read without iterating over the loader.
    """
    if not (isinstance(wanted.data, str) and wanted.data == "val"):
        return next(SeparateData(trainer, pl_module, wanted).rest(), None)
    if not trainer.enable_validation:
        return None
    batch = first_batch(loaders_in_turn(trainer, trainer.val_dataloaders), pl_module)
    if batch is None:
        return None
    inputs, targets = wanted.split(to_device(trainer, pl_module, batch))
    with trainer.precision_plugin.val_step_context():
        return heard_call(*as_call(inputs)[:2]), targets
