"""Run validation steps on a split of the data, and give the inputs of the network to a consumer."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.callbacks.base import MeasuringCallback
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, is_lightning_module, is_overridden
from lightning_flatness.callbacks.network import Network, is_sought, network_without_step
from lightning_flatness.cli.arguments import UsageError
from lightning_flatness.cli.splits import Split, quiet_trainer
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.measure.batches import described, entries_of
from lightning_flatness.model.answer import certify_weights

Found = TypeVar("Found", covariant=True)


class Consumer(Protocol[Found]):
    """An object that takes batches one by one and computes a result from all of them (``cli/consumers.py``)."""

    def add(self, network: Network, inputs: Any, targets: Tensor | None) -> None:
        """Take the inputs that the network has received in one validation step, and the targets of the batch."""

    def result(self) -> Found:
        """Return the result. When this is called, the network is still on the device of the validation steps."""


class SamplesOfSteps(MeasuringCallback, Generic[Found]):
    """A callback that gives ``consumer`` the inputs of the network and the targets of each validation step.

    ``name`` is the attribute in which the LightningModule holds the network, or None if the user names none. If
    ``has_steps`` is False, no validation step calls the network, and the consumer gets the inputs of the batch.
    ``targets`` names the entry of a batch that has the targets; None if the user does not name it. After every batch,
    the callback calls ``advance`` with the share of batches that are done.
    """

    def __init__(
        self,
        consumer: Consumer[Found],
        name: str | None,
        has_steps: bool,
        targets: str | None,
        advance: Callable[[float], None],
    ) -> None:
        super().__init__(
            "lightning-flatness",
            measured="flatness",
            data="val",
            max_samples=None,
            prefix="flatness",
            model=name,
            batch_fn=None if targets is None else targets_at(targets, has_steps),
            figures=False,
            figures_every=None,
            on_error="raise",
        )
        self._consumer, self._has_steps, self._advance = consumer, has_steps, advance
        self.found: Found | None = None

    def is_due(self, trainer: Trainer) -> bool:
        """Return True: every validation is measured."""
        return True

    def _draw_run(self, trainer: Trainer) -> None:
        """Do nothing: the command line draws no figures during the run."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forget the network of the previous step, so that the callback finds the network that this step calls.

        Keep it if no step has called a network yet, because it is then an error if this step does.
        """
        self._network = self._network if is_sought(self._network) else None
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
        """Give the consumer the inputs of the network in this step, and the targets."""
        asked = self._asked
        assert asked is not None
        with self._measuring(trainer, pl_module), torch.enable_grad(), asked.explaining():
            if self._has_steps:
                call = self._find_network(pl_module)
            else:
                call, self._network = None, network_without_step(pl_module, self.model)
            network = self._network
            if network is not None:  # None if the step skips an empty batch
                certify_weights(call)
                self._consumer.add(network, *asked.samples(call or asked.own_call()))
        self._stop_watching()
        self._advance((batch_idx + 1) / trainer.num_val_batches[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the result of the consumer in ``self.found``."""
        with self._measuring(trainer, pl_module), torch.enable_grad():
            self.found = self._consumer.result()


def visit(
    split: Split,
    model: nn.Module,
    consumer: Consumer[Found],
    *,
    inputs: str | None,
    network: str | None,
    targets: str | None,
    device: str,
    advance: Callable[[float], None],
) -> Found:
    """Run a validation step on every batch of a split, and return the result of the consumer.

    The consumer gets the inputs that the step gives to the network. With ``inputs="batch"``, or if the model has no
    validation step, no step runs and the consumer gets the inputs of the batch. ``network`` is the attribute in
    which the model holds the network. ``targets`` names the entry of a batch that has the targets. After every batch,
    ``advance`` is called with the share of batches that are done.
    """
    module: Any = model if is_lightning_module(model) else _Plain(model)
    has_steps = is_overridden("validation_step", module) and not isinstance(module, _Plain)
    if inputs == "step" and not has_steps:
        raise UsageError(
            f"--inputs step: {type(model).__name__} has no validation step. Without this option, the network gets the "
            "inputs of the batch."
        )
    has_steps = has_steps and inputs != "batch"
    if isinstance(module, _Plain):
        network = f"plain.{network}" if network else "plain"
    callback = SamplesOfSteps(consumer, network, has_steps, targets, advance)
    trainer = quiet_trainer(device, [callback])
    with _replaced(module, split, has_steps):
        try:
            trainer.validate(module, datamodule=split.data, verbose=False)
        except FlatnessError:
            raise
        except SystemExit as error:  # Lightning turns Ctrl-C into SystemExit
            raise KeyboardInterrupt from error
        except Exception as error:
            if not _is_of_step(error):
                raise
            raise FlatnessError(
                f"The validation step of {type(model).__name__} fails when it runs outside its training run, with "
                f"{type(error).__name__}: {error}. If the network takes the inputs of the batch as they are, give "
                "--inputs batch. Then no step runs."
            ) from error
    if callback.found is None:
        raise FlatnessError(f"The loader of the {split.name} data is empty: it yields no batch.")
    return callback.found


def targets_at(key: str, has_steps: bool) -> Callable[[Any], tuple[Any, Tensor]]:
    """Return a function from a batch to ``(inputs, targets)``, whose targets are the entry ``key`` of the batch.

    If ``has_steps``, the inputs are None, because they are taken from the call of the network in the validation step.
    Otherwise the inputs are the only other entry of the batch.
    """

    def split(batch: Any) -> tuple[Any, Tensor]:
        entries = {str(name): entry for name, entry in entries_of(batch).items()}
        targets = entries.pop(key, None)
        if not isinstance(targets, Tensor):
            raise BatchError(
                f"--targets {key}: a batch has no tensor with this key, attribute or position. The batch is "
                f"{described(batch)}."
            )
        if not has_steps and len(entries) != 1:
            raise BatchError(
                f"--targets {key}: without a validation step, a batch must have one entry for the network, besides "
                f"the targets. This batch is {described(batch)}."
            )
        return None if has_steps else next(iter(entries.values())), targets

    return split


class _Plain(LightningModule):
    """A LightningModule around a module of plain PyTorch, because a Trainer accepts only LightningModules."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.plain(*arguments, **keywords)

    def validation_step(self, *arguments: Any) -> None:
        """Do nothing: the callback measures the network on the inputs of the batch."""


@contextmanager
def _replaced(module: Any, split: Split, has_steps: bool) -> Iterator[None]:
    """In a ``with`` block, make the Trainer validate on ``split``.

    In the block, ``val_dataloader`` returns the loader of the split. ``prepare_data``, ``setup`` and ``teardown`` of
    the data module, or of the model if it has the loaders, do nothing, because the data are set up already. If
    ``has_steps`` is False, ``validation_step`` does nothing. Otherwise, if it takes a ``dataloader_idx``, it gets the
    number of the split's loader.
    """
    owner = module if split.data is None else split.data
    own: list[tuple[Any, str, Any]] = [(owner, "val_dataloader", lambda: split.loader)]
    own += [(owner, "prepare_data", lambda: None)]
    own += [(owner, name, lambda stage: None) for name in ("setup", "teardown")]
    step = module.validation_step

    def validation_step(batch: Any, batch_idx: int) -> Any:
        return step(batch, batch_idx, split.number)

    if not has_steps:
        own += [(module, "validation_step", lambda *arguments: None)]
    elif "dataloader_idx" in inspect.signature(step).parameters:
        own += [(module, "validation_step", validation_step)]
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
    """Return whether an error was raised inside a validation step and not inside a hook that this file defines."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {frame.f_code.co_name for frame in frames}
    hooks = {frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == __name__}
    return "validation_step" in names and hooks <= {"visit", "validation_step"}
