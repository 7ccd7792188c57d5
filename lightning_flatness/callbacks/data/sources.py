"""Where the samples come from: the batches that are validated, or a part of other data, read in step with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_flatness.callbacks.data.loaders import first_batch, is_indexed, loaders_in_turn, to_device
from lightning_flatness.callbacks.data.stream import ValidationStream, select
from lightning_flatness.callbacks.data.subset import FixedSubset, training_subset
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer
from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.batches import split_batch
from lightning_flatness.model.rows import num_rows

Samples = tuple[Any, Tensor | None]


def split_with(batch_fn: Callable[[Any], Samples] | None, batch: Any) -> Samples:
    """``(inputs, targets)`` of a batch.

    Raises:
        FlatnessError: the user's function returns something else.

    Example:
        >>> split_with(lambda batch: (batch["x"], None), {"x": 3})
        (3, None)
    """
    pair = split_batch(batch) if batch_fn is None else batch_fn(batch)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise FlatnessError(
            f"batch_fn=... returned a {type(pair).__name__}; it must return (inputs, targets), "
            "with None for targets that are not there."
        )
    return pair[0], pair[1]


class Validated:
    """The batches that are validated, each sample once.

    Args:
        batch_fn: from a batch to samples.
        max_samples: only so many, over all ranks.
    """

    def __init__(self, batch_fn: Callable[[Any], Samples] | None, max_samples: int | None) -> None:
        self._batch_fn = batch_fn
        self._max_samples = max_samples
        self._stream: ValidationStream | None = None

    def preview(self, trainer: Trainer, pl_module: LightningModule) -> Samples | None:
        """Samples to certify on before training, unless Lightning has not set up validation yet."""
        if not trainer.enable_validation:
            return None
        batch = first_batch(loaders_in_turn(trainer, trainer.val_dataloaders), pl_module)
        return None if batch is None else self.samples_of(to_device(trainer, pl_module, batch))

    def begin(self, trainer: Trainer, pl_module: LightningModule, loaders: Any, counts: Sequence[float]) -> None:
        """Begin at the first batch of the loaders, of which so many batches are run."""
        share = trainer.global_rank, trainer.world_size
        self._stream = ValidationStream(loaders_in_turn(trainer, loaders), counts, self._max_samples, *share)

    def parts(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> Iterator[Samples]:
        """What is to be measured of a batch that was validated."""
        assert self._stream is not None
        inputs, targets = self.samples_of(batch)
        mask = self._stream.mask(num_rows(inputs, targets), batch_idx, dataloader_idx)
        if mask.all():
            yield inputs, targets
        elif mask.any():
            yield select(inputs, targets, mask)

    def rest(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Samples]:
        """Nothing is left after the last batch."""
        return iter(())

    @property
    def why_not_live(self) -> str:
        """Why it is not known before a step what is to be measured of its batch; nothing, if it is."""
        if self._batch_fn is not None:
            return "batch_fn= is called after the step"
        return "" if self._max_samples is None else "max_samples= takes parts of batches"

    def samples_of(self, batch: Any) -> Samples:
        """The samples of a batch."""
        return split_with(self._batch_fn, batch)

    def let_go(self) -> None:
        """Let go of the loaders."""
        self._stream = None


class ReadApart:
    """A part of other data, in step with the batches that are validated, so that their progress bar tells the truth.

    Args:
        batch_fn: from a batch to samples.
        max_samples: only so many, over all ranks.
        data: ``"train"``, or a loader or batches.
    """

    def __init__(
        self,
        batch_fn: Callable[[Any], Samples] | None,
        max_samples: int | None,
        data: Literal["train"] | Iterable[Any],
    ) -> None:
        self._batch_fn = batch_fn
        self._max_samples = max_samples
        self._data = data
        self._subset: FixedSubset | None = None
        self._seen = 0
        self._expected: float = 1

    def preview(self, trainer: Trainer, pl_module: LightningModule) -> Samples | None:
        """Samples to certify on before training; None of a rank that has none."""
        self.begin(trainer, pl_module, None, [])
        first = next(self._up_to(1.0, trainer, pl_module), None)
        assert self._subset is not None
        self._subset.restart(pl_module)  # lets go of a worker process
        return first

    def begin(self, trainer: Trainer, pl_module: LightningModule, loaders: Any, counts: Sequence[float]) -> None:
        """Begin at the first sample, to be done with the last batch of the loaders."""
        if self._subset is None:
            share = trainer.global_rank, trainer.world_size
            if isinstance(self._data, str):
                batches = trainer.num_training_batches
                self._subset = training_subset(trainer.train_dataloader, self._max_samples, *share, batches)
            else:
                self._subset = FixedSubset(self._data, self._max_samples, *share)
        self._subset.restart(pl_module)
        in_turn = loaders_in_turn(trainer, loaders)
        # How many batches a stream has, only its end tells: then all is measured with the first.
        known = in_turn and all(is_indexed(loader) for loader in in_turn)
        self._seen, self._expected = 0, sum(counts) if known else 1

    def parts(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> Iterator[Samples]:
        """The next part, after a batch was validated."""
        self._seen += 1
        return self._up_to(self._seen / self._expected, trainer, pl_module)

    def rest(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Samples]:
        """What is left: of a rank that has no batches, all."""
        return self._up_to(1.0, trainer, pl_module)

    def _up_to(self, fraction: float, trainer: Trainer, pl_module: LightningModule) -> Iterator[Samples]:
        assert self._subset is not None
        for batch in self._subset.up_to(fraction):
            yield split_with(self._batch_fn, to_device(trainer, pl_module, batch))

    def let_go(self) -> None:
        """Let go of the data."""
        self._subset = None
