"""Read data without changing the user's loaders or random states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from lightning_flatness.callbacks.data.loaders import batch_size_of, is_indexed, keeps_order, sampler_of
from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.attributes import attributes_kept
from lightning_flatness.model.generators import drawing, generators_kept
from lightning_flatness.model.isolation import random_states_kept

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer

DEFAULT_BATCH_SIZE = 64


def own_loader(loader: Any, indices: Sequence[int] | None = None) -> DataLoader[Any]:
    """Create a loader over the user's data set. It shares no iterator, worker or generator with the user's loader.

    The new loader reads the samples at ``indices``, in this order. Without ``indices``, the new loader reads the whole
    data set, which may be an ``IterableDataset``.
    """
    # If the user's batch sampler does not tell its batch size, the new loader must yield batches all the same.
    size = batch_size_of(loader) or (DEFAULT_BATCH_SIZE if getattr(loader, "batch_sampler", None) is not None else None)
    return DataLoader(
        loader.dataset if indices is None else Subset(loader.dataset, indices),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers if indices is None else min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        drop_last=indices is None and size is not None and loader.drop_last,
        generator=torch.Generator(),  # so that no base seed is drawn from the global generator
    )


def batches_apart(batches: Any, model: nn.Module) -> Iterator[Any]:
    """Yield the batches of an iterable under fixed random seeds, and restore all random states after every batch.

    Because of the fixed seeds, random transforms give the same samples in every call. The restored states include those
    of the model's devices.
    """
    iterator: Iterator[Any] | None = None
    for index in count():
        with random_states_kept(model), generators_kept(drawing(batches)):
            seed_all(index)
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, iterator)
        if batch is iterator:
            return
        yield batch


def repeatable_batches(loader: DataLoader[Any], model: nn.Module) -> Iterator[Any]:
    """Yield the batches of a loader that :func:`own_loader` made. Every call yields the same batches.

    Raises:
        FlatnessError: The data set raised an error. The message names a remedy.
    """
    try:
        yield from batches_apart(loader, model)
    except Exception as error:
        raise FlatnessError(
            f"Reading samples from the data set by their index failed with {type(error).__name__}: {error}. "
            "Use data='val', or data= with a loader or batches of your own."
        ) from error


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (on the CPU), numpy and Python."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def first_batch(loaders: Sequence[Any], model: nn.Module) -> Any | None:
    """Read one batch from the data set of the first of the loaders, without iterating over that loader.

    Return None if reading fails, or if the data set cannot be read by index. Also return None if the class of the
    sampler or batch sampler is unknown, because then it is unknown which samples the loader reads.
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


# What transfer hooks change in a tensor or collection with more entries is not undone. A copy for every batch would
# cost too much, for example of a whole data set.
MOST_KEPT = 1000


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Convert a batch to the Trainer's precision and move it to the device, as the Trainer's loops do.

    The batch passes through the user's transfer hooks, under a fixed seed: hooks that draw random numbers on the CPU
    draw the same numbers every time. Random numbers that a hook draws on an accelerator are not fixed. The hooks run
    with ``trainer.validating`` True, so that they do not augment the batch as in training. What they change in
    attributes and buffers of the LightningModule and the data module is undone, except in large tensors and
    collections.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    # Without a data module, Trainer.datamodule is None.
    owners = [*pl_module.modules(), *filter(None, [getattr(trainer, "datamodule", None)])]
    with (
        random_states_kept(pl_module),
        _validating(trainer, pl_module),
        attributes_kept(owners, most=MOST_KEPT),
        _buffers_kept(pl_module),
    ):
        seed_all(0)
        # The public method would skip the hooks of a DataModule.
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Replace the modules' small buffers by copies in the ``with`` block, and put the originals back after it."""
    tables = [vars(module).get("_buffers", {}) for module in model.modules()]
    before = [dict(table) for table in tables]
    copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers() if buffer.numel() <= MOST_KEPT}
    try:
        for table in tables:
            table.update({name: copies[id(buffer)] for name, buffer in table.items() if id(buffer) in copies})
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


@contextmanager
def _validating(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Set ``trainer.validating`` to True and put all modules into evaluation mode; after the block, restore both."""
    stage, in_training = trainer.state.stage, [module for module in pl_module.modules() if module.training]
    try:
        trainer.validating = True
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True
        trainer.state.stage = stage
