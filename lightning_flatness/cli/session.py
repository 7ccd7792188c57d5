"""The session of a running command. It builds the networks and the data, and runs validation steps on the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

from lightning_flatness.callbacks.data.reading import seed_all
from lightning_flatness.cli.arguments import Command, UsageError
from lightning_flatness.cli.building import build, class_of, imported
from lightning_flatness.cli.checkpoints import Checkpoint
from lightning_flatness.cli.weights import load_weights
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import find_loss
from lightning_flatness.measure.progress import progress_bar


class Session:
    """The state of a running command: its options, its notes for the user, and the data, which all networks share."""

    def __init__(self, command: Command, config: Mapping[str, Any]) -> None:
        self.command, self._config = command, config
        self.loss = _loss(command.loss)
        configured = config.get("seed_everything")
        self.seed: int = next(
            (seed for seed in (command.seed, configured) if isinstance(seed, int) and not isinstance(seed, bool)), 0
        )
        self.show = False if command.quiet else None  # progress bars: never (False), or on a terminal (None)
        self.notes: list[str] = []
        self.classes: list[str] = []  # import paths of the models' classes
        self.details: dict[str, str] = {}
        self._data: Any = None
        self._has_data = False
        self._owner: Any = None  # whose data are set up: the data module, or a model with data of its own
        self._trainer: Any = None
        self._splits: dict[str, Any] = {}

    def model_of(self, checkpoint: Checkpoint) -> nn.Module:
        """Build the network of a checkpoint and load its weights; the first call also builds the data."""
        seed_all(self.seed)
        model, class_path, note = build("model", self.command, self._config, checkpoint)
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {class_path} makes a {type(model).__name__}, not a module of torch.")
        configure = getattr(model, "configure_model", None)
        if callable(configure):
            configure()
        self.notes += filter(None, [note, load_weights(model, checkpoint)])
        self.classes.append(class_path)
        if not self._has_data:
            self._data, self._has_data = self._data_of(checkpoint, model), True
        return model.eval()

    def _data_of(self, checkpoint: Checkpoint, model: nn.Module) -> Any:
        if not class_of("data", self.command, self._config, checkpoint) and _has_loader(model):
            return None
        data, class_path, note = build("data", self.command, self._config, checkpoint)
        self.notes += filter(None, [note])
        self.details["Data"] = class_path
        return data

    def visit(self, model: nn.Module, split: str, consumer: Any, max_samples: int | None, title: str = "") -> Any:
        """Run validation steps on a split of the data, and return the result of ``consumer``.

        The consumer (``cli/consumers.py``) gets the inputs that each step gives to the network, and the targets.
        ``title`` is the text of the progress bar; without a title there is no bar.
        """
        from lightning_flatness.cli.splits import set_up, split_of
        from lightning_flatness.cli.steps import visit

        command = self.command
        owner = model if self._data is None else self._data
        if owner is not self._owner:
            weights = deepcopy(model.state_dict()) if owner is model else None
            self._owner, self._trainer, self._splits = owner, set_up(owner, command.device), {}
            if weights is not None:  # as in Lightning, setup() does not change the weights of the checkpoint
                model.load_state_dict(weights, strict=False)
                model.eval()
        if split not in self._splits:
            number = command.loader if split == command.split else 0
            self._splits[split] = split_of(split, model, self._data, number, max_samples, self._trainer)
        seed_all(self.seed)
        with self._bar(title) as advance:
            return visit(
                self._splits[split],
                model,
                consumer,
                inputs=command.inputs,
                network=command.network,
                targets=command.targets,
                device=command.device,
                advance=advance,
            )

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[float], None]]:
        with progress_bar(self.show if title else False) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda share: bar.update(task, completed=share)


def _loss(text: str) -> Any:
    """Convert the value ``text`` of the option ``--loss`` to a value for the argument ``loss=`` of a measurement.

    A text without a dot is the name of a built-in loss, and is returned unchanged. Any other text is the import path of
    a function or a class. A function is returned; a class is called without arguments.
    """
    loss: Any = imported(text, f"--loss {text}") if "." in text else text
    try:
        loss = loss() if inspect.isclass(loss) else loss
    except Exception as error:
        raise UsageError(f"--loss {text}: calling it fails with {type(error).__name__}: {error}") from error
    try:
        find_loss(loss)
    except FlatnessError as error:
        raise UsageError(f"--loss {text}: {error}") from error
    return loss


def _has_loader(model: nn.Module) -> bool:
    from lightning_flatness.callbacks.lightning_imports import is_lightning_module, is_overridden

    return is_lightning_module(model) and is_overridden("val_dataloader", model)  # type: ignore[arg-type]
