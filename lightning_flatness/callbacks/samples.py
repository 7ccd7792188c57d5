"""Which samples are measured: a fixed part of the training data, or the validation batches as they come."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

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
    loader's own ``collate_fn``; random transforms draw the same numbers in every epoch. If the user's loader has
    workers, the subset is read by one worker of its own, else in the main process with random states kept. (A data set
    that keeps a random generator as its own attribute, and is read in the main process, is advanced.)

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
        if not is_map_style(dataset):
            raise FlatnessError(
                "FlatnessCallback(data='train') reads a fixed subset of the training data, so it needs one training "
                f"DataLoader over a data set with __getitem__ and __len__; the Trainer has a {type(loader).__name__}"
                + (f" over a {type(dataset).__name__}" if dataset is not None else "")
                + ". Use data='val', or measure_flatness on batches of your own."
            )
        # A sampler may leave samples out for good (SubsetRandomSampler): those are not training data.
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
        allowed = list(getattr(sampler, "indices", range(len(dataset))))
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(allowed), generator=generator)[: max_samples or DEFAULT_TRAINING_SAMPLES]
        self._loader = own_loader(loader, [allowed[i] for i in drawn.sort().values[rank::num_ranks].tolist()])
        self._batches: Iterator[Any] = iter(())
        self._given = 0

    def restart(self, model: nn.Module) -> None:
        """Begin at the first batch; ``model`` tells on which devices random states are kept."""
        self._given = 0
        self._batches = repeatable_batches(self._loader, model)

    def up_to(self, fraction: float) -> Iterator[Any]:
        """The next batches, until this fraction of the subset has been given since :meth:`restart`."""
        goal = math.ceil(len(self._loader) * min(1.0, fraction))
        while self._given < goal:
            self._given += 1
            yield next(self._batches)


def is_map_style(dataset: Any) -> bool:
    """Whether a data set can be read at any index, without an iterator's state."""
    has_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return has_index and not isinstance(dataset, IterableDataset)


def own_loader(loader: Any, indices: list[int]) -> DataLoader[Any]:
    """A loader over some samples of the user's data set, which shares no iterator, worker or generator with theirs."""
    batches = getattr(loader, "batch_sampler", None) is not None
    batch_size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", 64
    )
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=batch_size if batches else None,
        collate_fn=getattr(loader, "collate_fn", None),
        num_workers=min(1, getattr(loader, "num_workers", 0)),
        worker_init_fn=getattr(loader, "worker_init_fn", None),
        multiprocessing_context=getattr(loader, "multiprocessing_context", None),
        generator=torch.Generator(),  # an iterator draws its base seed here, not from the global generator
    )


def repeatable_batches(loader: DataLoader[Any], model: nn.Module) -> Iterator[Any]:
    """The batches of a loader of our own, with the same random numbers every time; random states are kept."""
    loader.generator.manual_seed(0)
    iterator: Iterator[Any] | None = None
    for index in range(len(loader)):
        with random_states_kept(model):
            torch.default_generator.manual_seed(index)
            random.seed(index)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(index)
            iterator = iter(loader) if iterator is None else iterator
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


def num_samples(loaders: Any, num_batches: Sequence[int | float]) -> int | None:
    """Samples in the first ``num_batches`` batches of one loader, or of a list or dict of them; None if unknown.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10.0))
        >>> num_samples([DataLoader(data, batch_size=4), DataLoader(data)], [2, 10])
        18
    """
    flat = flat_loaders(loaders)
    if len(flat) != len(num_batches):
        return None
    total = 0
    for loader, batches in zip(flat, num_batches, strict=True):
        batch_size = getattr(loader, "batch_size", None)
        if batch_size is None or not is_map_style(getattr(loader, "dataset", None)):
            return None
        total += int(min(len(loader.dataset), batches * batch_size))
    return total


def flat_loaders(loaders: Any) -> list[Any]:
    """One loader, or a list or dict of them, as a list."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for part in loaders for loader in flat_loaders(part)]
    return [] if loaders is None else [loaders]


def first_batch(loaders: Any, model: nn.Module) -> Any | None:
    """The first batch of the data set of the first loader, without touching that loader; None if there is none."""
    loader = next(iter(flat_loaders(loaders)), None)
    dataset = getattr(loader, "dataset", None)
    if not is_map_style(dataset):
        return None
    size = getattr(loader, "batch_size", None) or 1
    indices = list(range(min(size, len(cast(Any, dataset)))))
    return next(repeatable_batches(own_loader(loader, indices), model), None)


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Do to a batch what the Trainer's loops do, precision and transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    with random_states_kept(pl_module):
        batch = pl_module.on_before_batch_transfer(batch, 0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
