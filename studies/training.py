"""Train a stack of networks, and keep snapshots at given epochs and at given training losses.

The state of the training is saved regularly, and random numbers depend only on the seed and the epoch. So an
interrupted run can continue, and gives the same networks as a run without interruption.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from studies.data import Data, training_part
from studies.families import Configuration, Family
from studies.networks import build
from studies.stacked import Optimizer, Stack

SAVE_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Snapshot:
    """The weights of one network at one moment."""

    name: str  # the name of the configuration
    snapshot: str  # "epoch 15" or "loss 0.05"
    epoch: float
    state: dict[str, Tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        """Send weights to other processes by value, since a tensor in shared memory keeps a file open in each."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.state.items()}
        return _from_arrays, (self.name, self.snapshot, self.epoch, arrays)


def _from_arrays(name: str, snapshot: str, epoch: float, arrays: dict[str, Any]) -> Snapshot:
    return Snapshot(name, snapshot, epoch, {key: torch.from_numpy(array) for key, array in arrays.items()})


class Run:
    """The training of one stack of networks; each network has its own configuration."""

    def __init__(
        self, family: Family, configurations: Sequence[Configuration], data: Data, device: str = "cpu"
    ) -> None:
        self.family, self.configurations = family, tuple(configurations)
        first = configurations[0]
        self.first = first
        self.device = torch.device(device)
        parts = [training_part(data, configuration) for configuration in configurations]
        self.inputs = parts[0][0].to(self.device)
        self.targets = torch.stack([labels for _, labels in parts]).to(self.device)
        channels = self.inputs.shape[1]
        self.stack = Stack([build(c, channels).to(self.device, self.inputs.dtype) for c in configurations])
        rates, decays = (
            torch.tensor([getattr(c, key) for c in configurations], dtype=self.inputs.dtype, device=self.device)
            for key in ("learning_rate", "weight_decay")
        )
        self.optimizer = Optimizer(first.optimizer, self.stack, rates, decays)
        self.epoch, self.snapshots = 0, []
        self.steps = len(self.inputs) // first.batch_size

    def train(self, saved: Path | None = None, deadline: float = math.inf) -> list[Snapshot] | None:
        """Train to the last epoch and return the snapshots of all networks.

        If the file ``saved`` exists, training continues from the state in the file. After the ``deadline`` (in the
        units of ``time.time()``) training stops, the state is saved, and the function returns None.
        """
        if saved is not None and (state := saved_state(saved, self.configurations)):
            self.load(state)
        last = time.monotonic()
        while self.epoch < self.first.epochs:
            self._train_epoch()
            is_last, is_late = self.epoch == self.first.epochs, time.time() > deadline
            if saved is not None and (is_last or is_late or time.monotonic() - last > SAVE_EVERY):
                save(self.state(), saved)
                last = time.monotonic()
            if is_late and not is_last:
                return None
        return self.snapshots

    def _train_epoch(self) -> None:
        size, count = self.first.batch_size, len(self.stack)
        generators = [torch.Generator().manual_seed(seed_of(c.seed, self.epoch)) for c in self.configurations]
        orders = torch.stack([torch.randperm(len(self.inputs), generator=g) for g in generators]).to(self.device)
        torch.manual_seed(seed_of(self.first.seed, self.epoch))  # for dropout
        checks = {math.ceil((check + 1) * self.steps / self.family.checks) for check in range(self.family.checks)}
        for step in range(self.steps):
            chosen = orders[:, step * size : (step + 1) * size]
            inputs, targets = self.inputs[chosen], self.targets.gather(1, chosen)
            if self.first.augment:
                inputs = augmented(inputs, generators)
            self.optimizer.step(self.stack, inputs, targets, self._scale(step))
            if step + 1 in checks and self._missing():
                self._look(self.epoch + (step + 1) / self.steps)
        self.epoch += 1
        if self.epoch in self.family.epochs:
            for index in range(count):
                self._keep(index, f"epoch {self.epoch}", self.epoch)

    def _scale(self, step: int) -> float:
        if self.first.schedule == "constant":
            return 1.0
        done = (self.epoch * self.steps + step) / (self.first.epochs * self.steps)
        return min(1.0, 10 * done + 0.1) * (1 + math.cos(math.pi * done)) / 2  # with a short warm-up

    def _missing(self) -> bool:
        """Return whether a snapshot at one of the training losses is missing for some network."""
        reached = sum(snapshot.snapshot.startswith("loss") for snapshot in self.snapshots)
        return reached < len(self.stack) * len(self.family.losses)

    def _look(self, epoch: float) -> None:
        """Keep a snapshot of each network whose training loss reaches one of the given losses for the first time."""
        have = {(snapshot.name, snapshot.snapshot) for snapshot in self.snapshots}
        for index, loss in enumerate(self.stack.mean_losses(self.inputs, self.targets).tolist()):
            for wanted in self.family.losses:
                label = f"loss {wanted:g}"
                if loss <= wanted and (self.configurations[index].name, label) not in have:
                    self._keep(index, label, epoch)

    def _keep(self, index: int, label: str, epoch: float) -> None:
        state = self.stack.state_of(index)
        self.snapshots.append(Snapshot(self.configurations[index].name, label, epoch, state))

    def state(self) -> dict[str, Any]:
        """Return the state that is needed to continue the run."""
        return {
            "configurations": self.configurations,
            "epoch": self.epoch,
            "params": {name: p.detach() for name, p in self.stack.params.items()},
            "buffers": self.stack.buffers,
            "moments": self.optimizer.moments,
            "steps": self.optimizer.steps,
            "snapshots": self.snapshots,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.epoch, self.snapshots = state["epoch"], state["snapshots"]
        with torch.no_grad():
            for name, p in self.stack.params.items():
                p.copy_(state["params"][name])
        self.stack.buffers = {name: b.to(self.device) for name, b in state["buffers"].items()}
        self.optimizer.moments = [{n: m.to(self.device) for n, m in of.items()} for of in state["moments"]]
        self.optimizer.steps = state["steps"]


def saved_state(path: Path, configurations: Sequence[Configuration]) -> dict[str, Any]:
    """Read a saved state; it is empty if there is no file, or if the file is of other networks."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False) if path.exists() else {}
    return state if state.get("configurations") == tuple(configurations) else {}


def save(state: dict[str, Any], path: Path) -> None:
    """Save a state atomically: if the run is interrupted, the file still has its old content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def seed_of(seed: int, epoch: int) -> int:
    return 10_000 * (seed + 1) + epoch


def augmented(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return images ``(M, B, C, H, W)``, each shifted by up to an eighth of its width and mirrored at random."""
    count, size, width = images.shape[0], images.shape[1], images.shape[-1]
    reach = width // 8
    draws = [torch.randint(0, 2 * (2 * reach + 1) ** 2, (size,), generator=g) for g in generators]
    drawn = torch.stack(draws).to(images.device).flatten()
    mirror, rest = drawn % 2, drawn // 2
    down, right = rest // (2 * reach + 1), rest % (2 * reach + 1)
    flat = pad(images.flatten(0, 1), (reach,) * 4)
    line = torch.arange(width, device=images.device)
    rows = down[:, None] + line
    columns = right[:, None] + torch.where(mirror[:, None] == 1, width - 1 - line, line)
    every = torch.arange(len(flat), device=images.device)[:, None, None, None]
    channels = torch.arange(flat.shape[1], device=images.device)[None, :, None, None]
    moved = flat[every, channels, rows[:, None, :, None], columns[:, None, None, :]]
    return moved.reshape(count, size, *images.shape[2:])
