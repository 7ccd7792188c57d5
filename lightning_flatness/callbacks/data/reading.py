"""Reading data without a trace on the user's loaders and random states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from lightning_flatness.callbacks.data.loaders import batch_size_of, is_indexed, keeps_order, sampler_of
from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.generators import drawing, generators_kept
from lightning_flatness.model.isolation import random_states_kept

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer

DEFAULT_BATCH_SIZE = 64


def own_loader(loader: Any, indices: Sequence[int] | None = None) -> DataLoader[Any]:
    """Make a loader over the user's data set that shares no iterator, worker or generator with the user's.

    It reads the samples of ``indices``, in this order; or a stream, without indices.
    """
    # A batch sampler whose size is not known makes batches all the same.
    size = batch_size_of(loader) or (DEFAULT_BATCH_SIZE if getattr(loader, "batch_sampler", None) is not None else None)
    return DataLoader(
        loader.dataset if indices is None else Subset(loader.dataset, indices),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers if indices is None else min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        drop_last=indices is None and size is not None and loader.drop_last,
        generator=torch.Generator(),  # an iterator draws its base seed here, not from the global generator
    )


def batches_apart(batches: Any, model: nn.Module) -> Iterator[Any]:
    """Yield the batches of an iterable, drawing the same random numbers every time, and restore all random states.

    Those of the devices that the model is on are restored, too.
    """
    iterator: Iterator[Any] | None = None
    for index in count():
        with random_states_kept(model), generators_kept(drawing(batches)):
            _seed(index)
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, iterator)
        if batch is iterator:
            return
        yield batch


def repeatable_batches(loader: DataLoader[Any], model: nn.Module) -> Iterator[Any]:
    """Yield the batches of :func:`own_loader` as :func:`batches_apart` does."""
    try:
        yield from batches_apart(loader, model)
    except Exception as error:
        raise FlatnessError(
            f"There is a {type(error).__name__}: {error} where the data set is asked for samples by "
            "their number. Use data='val', or data= with a loader or batches of your own."
        ) from error


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def first_batch(loaders: Sequence[Any], model: nn.Module) -> Any | None:
    """Read as many samples as a batch has from the data set of the first loader, without touching that loader.

    None where it is not known which samples that loader would read.
    """
    loader = next(iter(loaders), None)
    known = (SequentialSampler, RandomSampler, DistributedSampler)
    if not is_indexed(loader) or not keeps_order(loader) or type(sampler_of(loader)) not in known:
        return None
    indices = list(range(min(batch_size_of(loader) or 1, len(cast(Any, loader).dataset))))
    try:
        return next(repeatable_batches(own_loader(loader, indices), model), None)
    except FlatnessError:
        return None


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Convert and move a batch as the Trainer's loops do, with transfer hooks, and the same random numbers every time.

    Hooks that draw on an accelerator draw others every time.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    with random_states_kept(pl_module):
        _seed(0)
        # The public name would pass over a DataModule's hook.
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
