"""Which samples are measured: a fixed part of the training data, or the validation batches as they come."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_flatness.capture import random_states_kept
from lightning_flatness.errors import FlatnessError

DEFAULT_TRAINING_SAMPLES = 4096


class TrainingSubset:
    """The same random samples of the training data in every epoch, read through a loader of its own.

    The user's loader is read for its settings and never iterated. Samples pass the data set's own transforms and the
    loader's own ``collate_fn``, in the main process; random transforms draw the same numbers in every epoch.

    Args:
        loader: the user's training ``DataLoader``.
        max_samples: size of the subset over all ranks; 4,096 by default.
        rank: which share of the subset.
        num_ranks: how many shares.

    Raises:
        FlatnessError: several loaders, or a data set without an index.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> subset = TrainingSubset(DataLoader(data, batch_size=4, shuffle=True), max_samples=6)
        >>> subset.restart(nn.Identity())
        >>> [len(batch[0]) for batch in subset.up_to(0.5)], [len(batch[0]) for batch in subset.up_to(1.0)]
        ([4], [2])
    """

    def __init__(self, loader: Any, max_samples: int | None = None, rank: int = 0, num_ranks: int = 1) -> None:
        dataset: Any = getattr(loader, "dataset", None)
        if (
            not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
            or isinstance(dataset, IterableDataset)
        ):
            raise FlatnessError(
                "FlatnessCallback(data='train') reads a fixed subset of the training data, so it needs one training "
                f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {type(loader).__name__}"
                + (f" over a {type(dataset).__name__}" if dataset is not None else "")
                + ". Use data='val', or measure_flatness on batches of your own."
            )
        # A sampler may leave samples out for good (SubsetRandomSampler): those are not training data.
        allowed = list(getattr(getattr(loader, "sampler", None), "indices", range(len(dataset))))
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(allowed), generator=generator)[: max_samples or DEFAULT_TRAINING_SAMPLES]
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset, [allowed[i] for i in drawn.sort().values[rank::num_ranks].tolist()]),
            batch_size=getattr(loader, "batch_size", None) or 64,
            collate_fn=getattr(loader, "collate_fn", None),
            generator=torch.Generator(),  # an iterator draws its base seed here, not from the global generator
        )
        self._batches: Iterator[Any] = iter(())
        self._given = 0

    def restart(self, model: nn.Module) -> None:
        """Begin at the first batch; ``model`` tells on which devices random states are kept."""
        self._given = 0
        self._batches = self._repeatable(model)

    def up_to(self, fraction: float) -> Iterator[Any]:
        """The next batches, until this fraction of the subset has been given since :meth:`restart`."""
        goal = math.ceil(len(self._loader) * min(1.0, fraction))
        while self._given < goal:
            self._given += 1
            yield next(self._batches)

    def _repeatable(self, model: nn.Module) -> Iterator[Any]:
        iterator = iter(self._loader)
        for index in range(len(self._loader)):
            with random_states_kept(model):
                torch.default_generator.manual_seed(index)
                random.seed(index)
                if "numpy" in sys.modules:
                    sys.modules["numpy"].random.seed(index)
                batch = next(iterator)
            yield batch


class FixedPositions:
    """A random choice of positions in the stream of validation samples, the same in every epoch.

    Args:
        chosen: how many positions.
        total: length of the stream; where unknown, the first ``chosen`` are taken.

    Example:
        >>> positions = FixedPositions(chosen=3, total=8)
        >>> sum(int(positions.of_next(4).sum()) for _ in range(2))
        3
    """

    def __init__(self, chosen: int, total: int | None) -> None:
        self._mask = torch.zeros(total if total is not None else chosen, dtype=torch.bool)
        self._mask[torch.randperm(len(self._mask), generator=torch.Generator().manual_seed(0))[:chosen]] = True
        self._seen = 0

    def of_next(self, size: int) -> Tensor:
        """Mask over the next ``size`` samples."""
        mask = self._mask[self._seen : self._seen + size]
        self._seen += size
        return nn.functional.pad(mask, (0, size - len(mask)))


def select(inputs: Any, targets: Tensor | None, positions: FixedPositions) -> tuple[Any, Tensor | None, int]:
    """The chosen samples of a batch, and how many they are.

    Example:
        >>> inputs, targets, count = select(torch.arange(4), None, FixedPositions(chosen=2, total=None))
        >>> inputs, count
        (tensor([0, 1]), 2)
    """
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(len(tensor)))
    size = sizes[0] if targets is None else len(targets)
    mask = positions.of_next(size)

    def take(tensor: Tensor) -> Tensor:
        return tensor[mask.to(tensor.device)] if tensor.ndim and len(tensor) == size else tensor

    return apply_to_collection(inputs, Tensor, take), None if targets is None else take(targets), int(mask.sum())


def num_samples(loaders: Any) -> int | None:
    """Samples in one loader, or in a list or dict of loaders; None where a data set has no length.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> num_samples([DataLoader(data), {"again": DataLoader(data)}])
        20
    """
    if isinstance(loaders, (list, tuple, dict)):
        parts = [num_samples(loader) for loader in (loaders.values() if isinstance(loaders, dict) else loaders)]
        return None if None in parts else sum(part for part in parts if part is not None)
    try:
        return len(loaders.dataset)
    except (AttributeError, TypeError):
        return None


def first_validation_batch(trainer: Trainer, pl_module: LightningModule) -> Any | None:
    """The first batch of the user's first validation loader, with random states kept; None if there is none."""
    loader = trainer.val_dataloaders
    while isinstance(loader, (list, tuple, dict)):
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
    if loader is None:
        return None
    with random_states_kept(pl_module):
        return next(iter(loader), None)


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Do to a batch what the Trainer's loops do, precision and transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    with random_states_kept(pl_module):
        batch = pl_module.on_before_batch_transfer(batch, 0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
