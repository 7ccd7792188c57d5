"""A split of the data of a run, set up once, and a Trainer that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from lightning_flatness.callbacks.data.loaders import described, flat_loaders, is_indexed
from lightning_flatness.callbacks.data.subset import DEFAULT_TRAINING_SAMPLES, FixedSubset
from lightning_flatness.callbacks.lightning_imports import Trainer
from lightning_flatness.cli.arguments import UsageError
from lightning_flatness.errors import FlatnessError


@dataclass(frozen=True)
class Split:
    """A split of the data that is set up: its loader, and who moves its batches to a device."""

    name: str  # "val" or "train"
    number: int  # of the loader among several
    loader: Any
    data: Any  # a LightningDataModule, or None if the model has the loader


def split_of(
    name: str, model: nn.Module, data: Any, number: int, max_samples: int | None, device: str = "cpu"
) -> Split:
    """Return a split, set up as for a fit, since a split that is drawn at random is drawn there.

    ``number`` is that of the loader among several. With ``max_samples`` it is a fixed random subset, as for
    :class:`~lightning_flatness.FlatnessCallback`; of training data one of 4,096 samples by default.
    """
    owner = model if data is None else data
    hook = "train_dataloader" if name == "train" else "val_dataloader"
    if not hasattr(owner, hook):
        if data is None:
            raise UsageError(
                "It is not said on which data: give --data package.DataModule, or the --config of the run."
            )
        raise UsageError(f"--data: {type(data).__name__} is no LightningDataModule, as it has no {hook}.")
    trainer = quiet_trainer(device, [])
    try:
        if data is not None:
            data.trainer = trainer
            data.prepare_data()
            data.setup("fit")
        loaders = flat_loaders(getattr(owner, hook)())
    except Exception as error:
        raise FlatnessError(f"{type(owner).__name__} gives no {name} data: {type(error).__name__}: {error}") from error
    if number >= len(loaders):
        there = f"{len(loaders)} loader{'s' if len(loaders) != 1 else ''} of {name} data"
        raise UsageError(f"--loader {number}: there are {there}, counted from 0.")
    loader = loaders[number]
    wanted = max_samples or (DEFAULT_TRAINING_SAMPLES if name == "train" else None)
    if wanted is None:
        return Split(name, number, loader, data)
    if not is_indexed(loader):
        raise UsageError(
            f"A subset (--max-samples, --split train) needs a DataLoader over a data set with __getitem__ and __len__; "
            f"{type(owner).__name__}.{hook}() returns a {described(loader)}."
        )
    return Split(name, number, _Subset(FixedSubset(loader, wanted), model), data)


class _Subset:
    """A fixed subset as a loader."""

    def __init__(self, subset: FixedSubset, model: nn.Module) -> None:
        self._subset, self._model = subset, model

    def __iter__(self) -> Iterator[Any]:
        return self._subset.batches(self._model)

    def __len__(self) -> int:
        return int(self._subset.num_batches)


def _alone() -> Any:
    """Return an environment of one process, whatever a cluster's job is told of others."""
    root = Trainer.__module__.removesuffix(".trainer.trainer")
    return import_module(f"{root}.plugins.environments").LightningEnvironment()


def quiet_trainer(device: str, callbacks: list[Any]) -> Trainer:
    """Return a Trainer on one device that writes nothing."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "gpu", "mps") or (index and not index.isdecimal()):
        raise UsageError(f"--device {device}: give auto, cpu, cuda, cuda:1 or mps.")
    try:
        return Trainer(
            accelerator=kind,
            plugins=[_alone()],
            devices=[int(index)] if index else 1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,
        )
    except Exception as error:
        raise UsageError(f"--device {device} is not to be had here: {error}") from error
