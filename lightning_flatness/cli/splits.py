"""A split of the data (training or validation), and the Trainer that reads the split."""

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
from lightning_flatness.results import number_of

# What to do if a split cannot be read.
REMEDIES = {
    "val": "Give --split train to measure the training data.",
    "train": "Give --split val to measure the validation data, and --no-train-loss if you compare networks.",
}


@dataclass(frozen=True)
class Split:
    """A split of the data (training or validation) with a loader that is ready to be read."""

    name: str  # "val" or "train"
    number: int  # index of the loader among the validation loaders
    loader: Any
    data: Any  # the LightningDataModule, whose hooks move batches to the device; None if the model has the loader


def set_up(owner: Any, device: str) -> Trainer:
    """Set up the data of a LightningDataModule or LightningModule, and return the Trainer that is attached to it.

    This calls ``prepare_data()`` and ``setup("fit")``, because data modules draw random splits there.

    Args:
        owner: the data module, or the model if it has the loaders.
        device: the option ``--device``.
    """
    if not hasattr(owner, "prepare_data"):
        raise UsageError(
            f"--data: {type(owner).__name__} is no LightningDataModule, as it has no prepare_data. Give the "
            "import path of a LightningDataModule class, or of a function that returns a LightningDataModule."
        )
    owner.trainer = trainer = quiet_trainer(device, [])
    try:
        owner.prepare_data()
        owner.setup("fit")
    except Exception as error:
        raise FlatnessError(
            f"The data of {type(owner).__name__} cannot be set up: {type(error).__name__}: {error}"
        ) from error
    return trainer


def split_of(name: str, model: nn.Module, data: Any, number: int, max_samples: int | None, trainer: Trainer) -> Split:
    """Return one split of data that are set up.

    Args:
        name: ``"val"`` or ``"train"``.
        model: the network.
        data: the LightningDataModule; None if the model has the loaders.
        number: index of the loader, if there are several.
        max_samples: size of a fixed random subset, drawn as in :class:`~lightning_flatness.FlatnessCallback`. If it is
            None, a validation split has all samples, and a training split a subset of 4,096.
        trainer: the Trainer from :func:`set_up`.
    """
    owner: Any = model if data is None else data
    hook = "train_dataloader" if name == "train" else "val_dataloader"
    owner.trainer = trainer  # a validation has put its own Trainer in the place of this one
    try:
        given = getattr(owner, hook)()
        loaders = flat_loaders(given)
    except Exception as error:
        raise FlatnessError(f"{type(owner).__name__} gives no {name} data: {type(error).__name__}: {error}") from error
    if given is None:
        raise FlatnessError(
            f"{type(owner).__name__}.{hook}() returns None, so there are no {name} data. {REMEDIES[name]}"
        )
    if number >= len(loaders):
        raise UsageError(
            f"--loader {number}: the {name} data have {number_of(len(loaders), 'loader')}; the first is --loader 0."
        )
    loader = loaders[number]
    wanted = max_samples or (DEFAULT_TRAINING_SAMPLES if name == "train" else None)
    if wanted is None:
        return Split(name, number, loader, data)
    if not is_indexed(loader):
        raise UsageError(
            f"A subset (--max-samples, or any training data) needs a DataLoader over a data set with __getitem__ and "
            f"__len__; {type(owner).__name__}.{hook}() returns a {described(loader)}. "
            + ("Leave out --max-samples." if name == "val" else REMEDIES[name])
        )
    return Split(name, number, _Subset(FixedSubset(loader, wanted), model), data)


class _Subset:
    """A loader that yields the batches of a fixed subset."""

    def __init__(self, subset: FixedSubset, model: nn.Module) -> None:
        self._subset, self._model = subset, model

    def __iter__(self) -> Iterator[Any]:
        return self._subset.batches(self._model)

    def __len__(self) -> int:
        return int(self._subset.num_batches)


def _alone() -> Any:
    """Return Lightning's plugin for a single process, which ignores the environment variables of a cluster job."""
    root = Trainer.__module__.removesuffix(".trainer.trainer")
    return import_module(f"{root}.plugins.environments").LightningEnvironment()


def quiet_trainer(device: str, callbacks: list[Any]) -> Trainer:
    """Return a Trainer that runs on one device, and that neither logs nor writes checkpoints."""
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
        raise UsageError(f"--device {device} cannot be used on this machine: {error}") from error
