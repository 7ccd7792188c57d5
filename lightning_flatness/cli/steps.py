"""Run validation steps on a split of the data, and pass on what each gives to the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.base import MeasuringCallback
from lightning_flatness.callbacks.data.loaders import described, flat_loaders, is_indexed
from lightning_flatness.callbacks.data.subset import DEFAULT_TRAINING_SAMPLES, FixedSubset
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, is_lightning_module, is_overridden
from lightning_flatness.callbacks.network import Network, network_without_step
from lightning_flatness.cli.arguments import UsageError
from lightning_flatness.errors import FlatnessError

Found = TypeVar("Found", covariant=True)


class Consumer(Protocol[Found]):
    """Takes the samples of one batch after the other, and returns what it makes of them."""

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Take the samples of a batch."""

    def result(self) -> Found:
        """Return the result. The network is still where it was measured."""


class SamplesOfSteps(MeasuringCallback, Generic[Found]):
    """A callback that passes on what each validation step gives to the network, and the targets of its batch.

    ``name`` is the attribute that is the network, if the user says so. Without steps, batches are passed on as they
    are.
    """

    def __init__(
        self, consumer: Consumer[Found], name: str | None, has_steps: bool, advance: Callable[[float], None]
    ) -> None:
        super().__init__("lightning-flatness", "flatness", "val", None, "flatness", name, None, False, "raise")
        self._consumer, self._has_steps, self._advance = consumer, has_steps, advance
        self.found: Found | None = None

    def is_due(self, trainer: Trainer) -> bool:
        """Measure always."""
        return True

    def _draw_run(self, trainer: Trainer) -> None:
        """Draw nothing."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch every step."""
        self._network = None
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pass the samples on."""
        asked = self._asked
        assert asked is not None
        with self._measuring(trainer, pl_module), torch.enable_grad(), asked.explaining():
            if self._has_steps:
                call = self._find_network(pl_module)
            else:
                call, self._network = None, network_without_step(pl_module, self.model)
            self._consumer.add(self._network_of(pl_module), *asked.samples(call or asked.own_call()))
        self._stop_watching()
        self._advance((batch_idx + 1) / trainer.num_val_batches[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the result."""
        with self._measuring(trainer, pl_module), torch.enable_grad():
            self.found = self._consumer.result()


@dataclass(frozen=True)
class Split:
    """A split of the data that is set up: its loader, and who moves its batches to a device."""

    name: str  # "val" or "train"
    loader: Any
    data: Any  # a LightningDataModule, or None if the model has the loader

    def visit(
        self,
        model: nn.Module,
        consumer: Consumer[Found],
        *,
        inputs: str | None = None,
        network: str | None = None,
        device: str = "auto",
        advance: Callable[[float], None] = lambda share: None,
    ) -> Found:
        """Run a validation step on every batch, and return what the consumer makes of what the network is given.

        With ``inputs="batch"``, or where there is no step, the network is given the batch's own inputs.
        """
        module = model if is_lightning_module(model) else _Plain(model)
        has_steps = is_overridden("validation_step", module) and not isinstance(module, _Plain)
        if inputs == "step" and not has_steps:
            raise UsageError(f"--inputs step: {type(model).__name__} has no validation step.")
        has_steps = has_steps and inputs != "batch"
        if isinstance(module, _Plain):
            network = f"plain.{network}" if network else "plain"
        callback = SamplesOfSteps(consumer, network, has_steps, advance)
        trainer = quiet_trainer(device, [callback])
        with _replaced(module, self.data, self.loader, has_steps):
            try:
                trainer.validate(module, datamodule=self.data, verbose=False)
            except FlatnessError:
                raise
            except Exception as error:
                if not _is_of_step(error):
                    raise
                raise FlatnessError(
                    f"The validation step of {type(model).__name__} fails outside of its run, with "
                    f"{type(error).__name__}: {error}. With --inputs batch the network is given the inputs of the batch "
                    "as they are, without a step."
                ) from error
        if callback.found is None:
            raise FlatnessError(f"The {self.name} data have no batch.")
        return callback.found


class _Plain(LightningModule):
    """A module of plain PyTorch, for a Trainer."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.plain(*arguments, **keywords)

    def validation_step(self, *arguments: Any) -> None:
        """Call nothing: the network is given the batch's own inputs."""


@contextmanager
def _replaced(module: Any, data: Any, loader: Any, has_steps: bool) -> Iterator[None]:
    """Make a split what the Trainer validates on; data that are set up are not set up again."""
    owner = module if data is None else data
    own: list[tuple[Any, str, Any]] = [(owner, "val_dataloader", lambda: loader)]
    if data is not None:
        own += [(data, "prepare_data", lambda: None), (data, "setup", lambda stage: None)]
    if not has_steps:
        own += [(module, "validation_step", lambda *arguments: None)]
    before = [vars(one).get(name) for one, name, _ in own]
    try:
        for one, name, value in own:
            vars(one)[name] = value
        yield
    finally:
        for (one, name, _), value in zip(own, before, strict=True):
            del vars(one)[name]
            if value is not None:
                vars(one)[name] = value


def _is_of_step(error: BaseException) -> bool:
    """Return whether an error was raised in a validation step, not in a hook of ours."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append((trace.tb_frame.f_code.co_name, trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    names = [name for name, _ in files]
    return "validation_step" in names and not any(module == __name__ and name != "visit" for name, module in files)


def quiet_trainer(device: str, callbacks: list[Any]) -> Trainer:
    """Return a Trainer on one device that writes nothing."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "gpu", "mps") or (index and not index.isdecimal()):
        raise UsageError(f"--device {device}: give auto, cpu, cuda, cuda:1 or mps.")
    try:
        return Trainer(
            accelerator=kind,
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
            raise UsageError("It is not said on which data: give --data package.DataModule, or the --config of the run.")
        raise UsageError(f"--data: {type(data).__name__} is no LightningDataModule, as it has no {hook}.")
    try:
        if data is not None:
            data.trainer = quiet_trainer(device, [])
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
        return Split(name, loader, data)
    if not is_indexed(loader):
        raise UsageError(
            f"A subset (--max-samples, --split train) needs a DataLoader over a data set with __getitem__ and __len__; "
            f"{type(owner).__name__}.{hook}() returns a {described(loader)}."
        )
    return Split(name, _Subset(FixedSubset(loader, wanted), model), data)


class _Subset:
    """A fixed subset as a loader."""

    def __init__(self, subset: FixedSubset, model: nn.Module) -> None:
        self._subset, self._model = subset, model

    def __iter__(self) -> Iterator[Any]:
        return self._subset.batches(self._model)

    def __len__(self) -> int:
        return int(self._subset.num_batches)
