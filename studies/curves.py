"""Flatness during training: measure twenty runs after every epoch, and compare rules that pick an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from studies.data import Data, training_part
from studies.families import DIGITS, Configuration, Family
from studies.markdown import number
from studies.measuring import error_of, logits_of, network_of
from studies.running import Settings, load, measure_all
from studies.statistics import DRAWS
from studies.tables import Table, column_of, read_rows, write_rows
from studies.training import Run, Snapshot

EPOCHS, BURN_IN, PATIENCE, VALIDATION = 60, 10, 5, 300
FLATNESS = ("hessian_trace", "relative_flatness", "normalized_relative_flatness")
Curve = dict[str, np.ndarray]


def family() -> Family:
    """Return twenty runs: with and without label noise, two learning rates, five seeds."""
    keys = ("label_noise", "learning_rate", "seed")
    levels = product((0.0, 0.2), (0.02, 0.1), range(5))
    found = tuple(
        replace(DIGITS, name=f"curves-{number:02d}", epochs=EPOCHS, **dict(zip(keys, values, strict=True)))
        for number, values in enumerate(levels)
    )
    return Family(
        name="curves", data="digits", configurations=found, epochs=tuple(range(1, EPOCHS + 1)), losses=(), checks=1,
        stack=20, stack_on_cpu=20, factors=keys[:-1], measured_samples=200, costly=(),
    )  # fmt: skip


class Worker:
    """The state and the tasks of a worker process."""

    data: Data

    @classmethod
    def begin(cls, settings: Settings) -> None:
        if settings.jobs > 1:
            torch.set_num_threads(1)
        cls.data = load("digits", settings)

    @classmethod
    def measure(cls, name: str, epoch: int, configuration: Configuration, snapshot: Snapshot) -> dict[str, Any]:
        data, model = cls.data, network_of(configuration, snapshot, cls.data)
        parts = {
            "train": training_part(data, configuration),
            "val": (data.test_images[:VALIDATION], data.test_labels[:VALIDATION]),
            "test": (data.test_images[VALIDATION:], data.test_labels[VALIDATION:]),
        }
        found: dict[str, Any] = {"name": name, "epoch": epoch}
        for part, (images, labels) in parts.items():
            logits = logits_of(model, images)
            found |= {f"{part}_loss": float(cross_entropy(logits, labels)), f"{part}_error": error_of(logits, labels)}
        for part in ("train", "val"):
            report = lf.measure_flatness(model, [parts[part]], progress=False)
            found |= {f"{part}_{measure}": float(getattr(report, measure)) for measure in FLATNESS}
        return found


def run(settings: Settings, console: Console) -> None:
    """Train the twenty runs, and measure the epochs that are not in the table yet."""
    of, table = family(), Table(settings.results / "curves.csv", "name", "epoch")
    every = {c.name: c for c in of.configurations}
    saved = settings.work / "curves" / "stack-000.pt"
    snapshots = Run(of, of.configurations, load("digits", settings), settings.device).train(saved) or []
    tasks = [(one.name, int(one.epoch), every[one.name], one) for one in snapshots]
    measure_all(tasks, Worker.measure, Worker.begin, settings, table, console, "runs and epochs")


def lowest(key: str) -> Callable[[Curve], int]:
    return lambda curve: BURN_IN + int(np.argmin(curve[key][BURN_IN:]))


def lowest_ratio(key: str) -> Callable[[Curve], int]:
    return lambda curve: BURN_IN + int(np.argmin((curve[f"val_{key}"] / curve[f"train_{key}"])[BURN_IN:]))


def stalled(*watched: tuple[str, float]) -> Callable[[Curve], int]:
    """Return the rule of ``FlatnessStopping``: stop when no watched number has improved for ``PATIENCE`` epochs.

    ``watched`` are pairs of a number's name and the share by which the number must fall to count as improved.
    """

    def rule(curve: Curve) -> int:
        best, waits = dict.fromkeys(watched, np.inf), dict.fromkeys(watched, 0)
        for epoch in range(BURN_IN, EPOCHS):
            for key, part in watched:
                value = curve[key][epoch]
                if not np.isfinite(best[key, part]) or value < best[key, part] * (1 - part):
                    best[key, part], waits[key, part] = value, 0
                else:
                    waits[key, part] += 1
            if min(waits.values()) >= PATIENCE:
                return epoch
        return EPOCHS - 1

    return rule


# For every rule: what it needs in addition to the training data, and a function that returns the index of the epoch.
RULES: dict[str, tuple[str, Callable[[Curve], int]]] = {
    "last epoch": ("nothing", lambda curve: EPOCHS - 1),
    "epoch 20": ("nothing", lambda curve: 19),
    "epoch 40": ("nothing", lambda curve: 39),
    "lowest training loss": ("nothing", lowest("train_loss")),
    "lowest validation loss": ("labels", lowest("val_loss")),
    "lowest validation error": ("labels", lowest("val_error")),
    "stop when validation error stalls": ("labels", stalled(("val_error", 0.0))),
    "FlatnessStopping's rule": ("labels", stalled(("train_relative_flatness", 0.01), ("val_error", 0.0))),
    "stop when relative flatness stalls": ("nothing", stalled(("train_relative_flatness", 0.01))),
    "lowest relative flatness, training": ("nothing", lowest("train_relative_flatness")),
    "lowest relative flatness, validation": ("images", lowest("val_relative_flatness")),
    "lowest normalised, training": ("nothing", lowest("train_normalized_relative_flatness")),
    "lowest Hessian trace, training": ("nothing", lowest("train_hessian_trace")),
    "lowest ratio of validation to training, relative flatness": ("images", lowest_ratio("relative_flatness")),
    "lowest ratio of validation to training, Hessian trace": ("images", lowest_ratio("hessian_trace")),
}


def setting_of() -> dict[str, tuple[float, float]]:
    """Return label noise and learning rate of every run, by name."""
    return {c.name: (c.label_noise, c.learning_rate) for c in family().configurations}


def drawn_seeds(settings: Sequence[object], seed: int) -> np.ndarray:
    """Draw the runs of every setting with replacement; return indices of runs, ``(DRAWS, n)``."""
    generator, parts = np.random.default_rng(seed), []
    for setting in dict.fromkeys(settings):
        mine = np.array([index for index, own in enumerate(settings) if own == setting])
        parts.append(mine[generator.integers(len(mine), size=(DRAWS, len(mine)))])
    return np.concatenate(parts, axis=1)


def by_setting(results: Path, rule: str = "FlatnessStopping's rule") -> str:
    """Return a sentence on the change of the test error by one rule, in every setting."""
    curves, settings, parts = curves_of(results), setting_of(), []
    for noise, rate in sorted({settings[name] for name in curves}):
        mine = [curve for name, curve in curves.items() if settings[name] == (noise, rate)]
        change = np.mean([curve["test_error"][RULES[rule][1](curve)] - curve["test_error"][-1] for curve in mine])
        parts.append(f"{number(100 * change)} (label noise {noise:g}, learning rate {rate:g})")
    return f"By setting, {rule} changes the error by these points: {', '.join(parts)}."


def curves_of(results: Path) -> dict[str, Curve]:
    """Return the measured numbers of every run as arrays ``(epochs,)``; runs with missing epochs are left out."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(results / "curves.csv"):
        found.setdefault(row["name"], []).append(row)
    curves = {}
    for name, rows in sorted(found.items()):
        rows.sort(key=lambda row: int(row["epoch"]))
        if len(rows) == EPOCHS:
            curves[name] = {key: column_of(rows, key) for key in rows[0] if key != "name"}
    return curves


def analyse(results: Path, seed: int = 0, is_written: bool = True) -> list[dict[str, Any]]:
    """Return rows with test error and loss at the epoch that a rule picks, and their changes from the last epoch."""
    curves = curves_of(results)
    if len(curves) < 5:
        return []
    settings = setting_of()
    rows = []
    for scope, level in (("all runs", None), ("no label noise", 0.0), ("label noise 0.2", 0.2)):
        names = [name for name in curves if level is None or settings[name][0] == level]
        mine, drawn = [curves[name] for name in names], drawn_seeds([settings[name] for name in names], seed)
        for rule, (needs, pick) in RULES.items():
            epochs = [pick(curve) for curve in mine]
            row = {"scope": scope, "rule": rule, "needs": needs, "runs": len(mine), "epoch": float(np.mean(epochs)) + 1}
            for key in ("test_error", "test_loss"):
                picked = np.array([curve[key][epoch] for curve, epoch in zip(mine, epochs, strict=True)])
                change = picked - np.array([curve[key][-1] for curve in mine])
                low, high = np.quantile(change[drawn].mean(1), [0.025, 0.975])
                row |= {key: float(picked.mean()), f"{key}_change": float(change.mean())}
                row |= {f"{key}_low": float(low), f"{key}_high": float(high)}
            rows.append(row)
    if is_written:
        write_rows(results / "curves-rules.csv", rows)
    return rows
