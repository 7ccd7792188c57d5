"""Run validation steps on a split of the data, and pass on what each gives to the network."""

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
from lightning_flatness.callbacks.network import Network, network_without_step
from lightning_flatness.cli.arguments import UsageError
from lightning_flatness.cli.splits import Split, quiet_trainer
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
        super().__init__(
            "lightning-flatness",
            measured="flatness",
            data="val",
            max_samples=None,
            prefix="flatness",
            model=name,
            batch_fn=None,
            figures=False,
            figures_every=None,
            on_error="raise",
        )
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


def visit(
    split: Split,
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
    module: Any = model if is_lightning_module(model) else _Plain(model)
    has_steps = is_overridden("validation_step", module) and not isinstance(module, _Plain)
    if inputs == "step" and not has_steps:
        raise UsageError(f"--inputs step: {type(model).__name__} has no validation step.")
    has_steps = has_steps and inputs != "batch"
    if isinstance(module, _Plain):
        network = f"plain.{network}" if network else "plain"
    callback = SamplesOfSteps(consumer, network, has_steps, advance)
    trainer = quiet_trainer(device, [callback])
    with _replaced(module, split, has_steps):
        try:
            trainer.validate(module, datamodule=split.data, verbose=False)
        except FlatnessError:
            raise
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
        except Exception as error:
            if not _is_of_step(error):
                raise
            raise FlatnessError(
                f"The validation step of {type(model).__name__} fails outside of its run, with "
                f"{type(error).__name__}: {error}. With --inputs batch no step is run, and the network is given "
                "the inputs of the batch as they are."
            ) from error
    if callback.found is None:
        raise FlatnessError(f"The {split.name} data have no batch.")
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
def _replaced(module: Any, split: Split, has_steps: bool) -> Iterator[None]:
    """Make a split what the Trainer validates on; data that are set up are not set up again."""
    data = split.data
    own: list[tuple[Any, str, Any]] = [(module if data is None else data, "val_dataloader", lambda: split.loader)]
    if data is not None:
        own += [(data, "prepare_data", lambda: None), (data, "setup", lambda stage: None)]
    step = module.validation_step
    if not has_steps:
        own += [(module, "validation_step", lambda *arguments: None)]
    elif "dataloader_idx" in inspect.signature(step).parameters:
        own += [(module, "validation_step", lambda batch, batch_idx: step(batch, batch_idx, split.number))]
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
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {frame.f_code.co_name for frame in frames}
    hooks = {frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == __name__}
    return "validation_step" in names and hooks <= {"visit"}
