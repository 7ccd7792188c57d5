"""The sources of the samples of a measurement: the validated batches, or other data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_flatness.callbacks.data.loaders import is_indexed, loaders_in_turn
from lightning_flatness.callbacks.data.reading import first_batch, to_device
from lightning_flatness.callbacks.data.stream import ValidationStream, select
from lightning_flatness.callbacks.data.subset import FixedSubset, training_subset
from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.batches import split_batch
from lightning_flatness.model.rows import num_rows

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer

Samples = tuple[Any, Tensor | None]
BatchFunction = Callable[[Any], Samples]


@dataclass(frozen=True)
class Wanted:
    """The data to measure (``"val"``, ``"train"`` or given data), and the number of samples over all ranks."""

    data: str | Iterable[Any]
    max_samples: int | None
    batch_fn: BatchFunction | None

    def split(self, batch: Any) -> Samples:
        """Return ``(inputs, targets)`` of a batch."""
        pair = split_batch(batch) if self.batch_fn is None else self.batch_fn(batch)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise FlatnessError(
                f"batch_fn=... returned a {type(pair).__name__}; it must return (inputs, targets), "
                "with None for targets that are not there."
            )
        return pair[0], pair[1]


class ValidationBatches:
    """The validated batches as a source. It yields every sample once, though Lightning may repeat samples.

    Lightning validates ``num_batches`` batches of each loader. To observe the forward pass of a validation step, a
    callback must know before the step which samples of the batch to measure. If it cannot know this,
    ``why_not_observed`` contains the reason; otherwise it is empty.
    """

    def __init__(self, trainer: Trainer, wanted: Wanted, loaders: Any, num_batches: Sequence[float]) -> None:
        in_turn, ranks = loaders_in_turn(trainer, loaders), (trainer.global_rank, trainer.world_size)
        self._stream = ValidationStream(in_turn, num_batches, wanted.max_samples, *ranks)
        self._wanted = wanted
        self.why_not_observed = "batch_fn= is called after the step" if wanted.batch_fn is not None else ""
        if wanted.batch_fn is None and wanted.max_samples is not None:
            self.why_not_observed = "max_samples= takes parts of batches"

    def after_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Iterator[Samples]:
        """Yield the samples to measure of a batch that was validated."""
        inputs, targets = self._wanted.split(batch)
        mask = self._stream.mask(num_rows(inputs, targets), batch_idx, dataloader_idx)
        if mask.all():
            yield inputs, targets
        elif mask.any():
            yield select(inputs, targets, mask)

    def rest(self) -> Iterator[Samples]:
        """Yield nothing, since all samples were measured with their batches."""
        return iter(())


class SeparateData:
    """A source that reads training data or given data, separately from the validated batches.

    Its samples are measured in equal parts, one part after each validated batch, so that validation's progress bar
    shows the true progress. Lightning validates ``num_batches`` batches of each of the ``loaders``.
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
        if isinstance(wanted.data, str):
            subset = training_subset(trainer.train_dataloader, wanted.max_samples, *share, trainer.num_training_batches)
        else:
            subset = FixedSubset(wanted.data, wanted.max_samples, *share)
        self._trainer, self._pl_module, self._wanted = trainer, pl_module, wanted
        self._batches = subset.batches(pl_module)
        self._num_batches = subset.num_batches
        self._num_read = 0
        self._num_validated = 0
        in_turn = loaders_in_turn(trainer, loaders)
        # If the number of validated batches is not known before, everything is measured after the first batch.
        self._num_to_validate = sum(num_batches) if in_turn and all(map(is_indexed, in_turn)) else 1

    def after_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Iterator[Samples]:
        """Yield the next part of the samples after a batch was validated."""
        self._num_validated += 1
        fraction = self._num_validated / self._num_to_validate
        if fraction >= 1:
            return self.rest()
        return self._read_until(0 if math.isinf(self._num_batches) else math.ceil(self._num_batches * fraction))

    def rest(self) -> Iterator[Samples]:
        """Yield the remaining samples: all samples if there was no validation or this rank validated no batch."""
        return self._read_until(math.inf)

    def _read_until(self, goal: float) -> Iterator[Samples]:
        while self._num_read < goal and (batch := next(self._batches, self)) is not self:
            self._num_read += 1
            yield self._wanted.split(to_device(self._trainer, self._pl_module, batch))


def first_samples(trainer: Trainer, pl_module: LightningModule, wanted: Wanted) -> Samples | None:
    """Return the first batch of samples before training, without changing its loader.

    Return None if this is not possible, if Lightning has not set up validation yet, or if this rank has no samples.
    """
    if not (isinstance(wanted.data, str) and wanted.data == "val"):
        return next(SeparateData(trainer, pl_module, wanted).rest(), None)
    if not trainer.enable_validation:
        return None
    batch = first_batch(loaders_in_turn(trainer, trainer.val_dataloaders), pl_module)
    return None if batch is None else wanted.split(to_device(trainer, pl_module, batch))
