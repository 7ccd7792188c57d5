"""Measure networks on distorted test images: does a measure change together with the accuracy?

A shift is one kind of distortion. As in the papers on Hessian criteria (Gabdullin 2024, 2025), the networks stay the
same and the data change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from studies import distortions
from studies.data import Data, black_of
from studies.distortions import Distortion
from studies.families import Configuration, Family, cifar, digits, stacks
from studies.measuring import error_of, logits_of, network_of, spectrum_of
from studies.running import Settings, load, measure_all
from studies.statistics import DRAWS, tau
from studies.tables import Table, column_of, read_rows, write_rows
from studies.training import Run, Snapshot, saved_state

CLEAN = "clean"
# For each measure, its label and a sign. The measure times the sign is expected to rise where the accuracy falls.
MEASURES = {
    "confidence": ("−mean confidence", -1),
    "loss": ("test loss", 1),
    "hessian_trace": ("Hessian trace, last convolution", 1),
    "relative_flatness": ("relative flatness, last convolution", 1),
    "normalized_relative_flatness": ("normalised, last convolution", 1),
    "trace.network": ("Hessian trace, whole network", 1),
    "lambda_max.network": ("λ_max, whole network", 1),
    "r_e": ("r_e, whole network", 1),
    "k_hn": ("K_Hn, whole network", 1),
    "c_t": ("C_t, whole network", -1),
}
BASELINES = ("confidence", "loss")


@dataclass(frozen=True, kw_only=True)
class Shifts:
    """Networks of a family at one snapshot, and the distortions of the test images that they are measured on."""

    part: str  # its name on the command line, and the beginning of the names of its CSV files
    family: Family
    configurations: tuple[Configuration, ...]
    snapshot: str
    distortions: dict[str, Distortion]
    measured: int  # number of test images that measures are computed on
    trains: bool  # whether to train networks again if their weights are gone

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the images: as they are, and distorted."""
        return (CLEAN, *self.distortions)

    def images(self, kind: str, images: Tensor) -> Tensor:
        """Return images as they are or distorted."""
        black = black_of(self.family.data).to(images)
        return images if kind == CLEAN else self.distortions[kind](images, black)


def of_digits() -> Shifts:
    """Return the shifts of the digits: one seed, no weight decay, two batch sizes and two learning rates."""
    every = (c for c in digits().configurations if not c.seed and not c.weight_decay)
    chosen = tuple(c for c in every if c.batch_size in (10, 100) and c.learning_rate in (0.02, 0.2))
    return Shifts(
        part="shift", family=digits(), configurations=chosen, snapshot="epoch 120", distortions=distortions.DIGITS,
        measured=200, trains=True,
    )  # fmt: skip


# The centre of the star, and one arm for most hyper-parameters. Larger networks are left out because they take
# too long. On a slow core each of these 12 takes about 15 seconds for every kind of images.
ARMS = (
    "centre", "width 8", "depth 3", "batch_norm False", "dropout 0.3", "augment True", "optimizer adam",
    "batch_size 20", "learning_rate 0.02", "weight_decay 0.005", "label_noise 0.2", "train_size 2000",
)  # fmt: skip


def of_cifar() -> Shifts:
    """Return the shifts of CIFAR-10, with the networks of the last seed from the centre and some arms of the star."""
    family = cifar()
    last = family.configurations[-1].seed
    chosen = tuple(c for c in family.configurations if c.seed == last and c.arm in ARMS)
    return Shifts(
        part="shift-cifar", family=family, configurations=chosen, snapshot="epoch 60", distortions=distortions.CIFAR,
        measured=64, trains=False,
    )  # fmt: skip


PARTS: dict[str, Callable[[], Shifts]] = {"shift": of_digits, "shift-cifar": of_cifar}


class Worker:
    """The state and the tasks of a worker process."""

    data: Data
    of: Shifts

    @classmethod
    def begin(cls, of: Shifts, settings: Settings) -> None:
        if settings.jobs > 1:
            torch.set_num_threads(1)
        cls.of, cls.data = of, load(of.family.data, settings)

    @classmethod
    def measure(cls, name: str, kind: str, configuration: Configuration, snapshot: Snapshot) -> dict[str, Any]:
        model, count = network_of(configuration, snapshot, cls.data), cls.of.measured
        images, labels = cls.of.images(kind, cls.data.test_images), cls.data.test_labels
        logits = logits_of(model, images)
        batches = [(images[:count], labels[:count])]
        report = lf.measure_flatness(model, batches, progress=False)
        found = {"error": error_of(logits, labels), "loss": float(cross_entropy(logits, labels))}
        found["confidence"] = float(logits.softmax(1).amax(1).mean())
        flatness = ("hessian_trace", "relative_flatness", "normalized_relative_flatness")
        found |= {measure: float(getattr(report, measure)) for measure in flatness}
        return {"name": name, "shift": kind} | found | spectrum_of(model, batches)


def run(of: Shifts, settings: Settings, console: Console) -> None:
    """Measure all networks on all kinds of images, and add the rows that are not in the table.

    The names of networks without saved weights are printed.
    """
    table = Table(settings.results / f"{of.part}.csv", "name", "shift")
    missing = [c for c in of.configurations if any((c.name, kind) not in table for kind in of.kinds)]
    found = snapshots(of, missing, settings)
    without = [c.name for c in missing if c.name not in found]
    if without:
        console.print(no_weights(of, without, settings), soft_wrap=True)
    tasks = [(c.name, kind, c, found[c.name]) for c in missing if c.name in found for kind in of.kinds]
    if tasks:
        begin = partial(Worker.begin, of)
        measure_all(tasks, Worker.measure, begin, settings, table, console, "networks and shifts")


def snapshots(of: Shifts, wanted: Sequence[Configuration], settings: Settings) -> dict[str, Snapshot]:
    """Return a mapping from names of networks to their snapshots.

    The snapshots come from saved states. If ``of.trains``, networks without a saved state are trained again.
    """
    names, found = {c.name for c in wanted}, {}
    for number, stack in enumerate(stacks(of.family, settings.device)):
        if names.isdisjoint(c.name for c in stack):
            continue
        saved = settings.saved(of.family, number)
        if of.trains:
            every = Run(of.family, stack, load(of.family.data, settings), settings.device).train(saved) or []
        else:
            every = saved_state(saved, stack).get("snapshots", [])
        found |= {one.name: one for one in every if one.name in names and one.snapshot == of.snapshot}
    return found


def no_weights(of: Shifts, names: Sequence[str], settings: Settings) -> str:
    """Return a message that says which networks have no weights, and which command makes them."""
    family, folder = of.family.name, settings.work / of.family.name
    text = (
        f"{of.part}: {folder} has no weights at {of.snapshot} of {len(names)} of {len(of.configurations)} networks "
        f"({', '.join(names)}), so they are not measured. To train them, which takes hours: "
        f"python -m studies {family} --keep-weights --work {settings.work}, with the same --device."
    )
    done = settings.results / f"{family}-configurations.csv"
    if {row["name"] for row in read_rows(done)}.isdisjoint(names):
        return text
    return f"{text} It leaves out networks that are in {done}: --results with another folder trains them again."


def measured(results: Path, of: Shifts) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    """Return the names of the networks that were measured on all kinds of images, and a mapping from kinds to rows."""
    at = {(row["name"], row["shift"]): row for row in read_rows(results / f"{of.part}.csv")}
    names = [name for name in sorted({name for name, _ in at}) if all((name, kind) in at for kind in of.kinds)]
    return names, {kind: [at[name, kind] for name in names] for kind in of.kinds}


def analyse(results: Path, of: Shifts, seed: int = 0, is_written: bool = True) -> list[dict[str, Any]]:
    """Return a row for each measure, with Kendall's τ between changes of the measure and changes of the error.

    A change is the difference between distorted and clean images. τ is computed over the shifts for every network, and
    over the networks for every shift, and then averaged.
    """
    names, by_kind = measured(results, of)
    if len(names) < 5:
        return []

    def change(measure: str, sign: int) -> np.ndarray:
        clean = column_of(by_kind[CLEAN], measure)
        return sign * np.stack(
            [column_of(by_kind[kind], measure) - clean for kind in of.distortions]
        )  # (shifts, networks)

    error, found = change("error", 1), []
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    for measure, (label, sign) in MEASURES.items():
        changes = change(measure, sign)
        within = np.array([tau(changes[:, i], error[:, i]) for i in range(len(names))])
        low, high = np.quantile(np.nanmean(within[drawn], axis=1), [0.025, 0.975])
        across = [tau(changes[i], error[i]) for i in range(len(of.distortions))]
        row = {"measure": measure, "label": label, "networks": len(names), "shifts": len(of.distortions)}
        row |= {"over_shifts": float(np.nanmean(within)), "low": float(low), "high": float(high)}
        row |= {"over_networks": float(np.nanmean(across))}
        row |= {"over_networks_low": float(np.nanmin(across)), "over_networks_high": float(np.nanmax(across))}
        found.append(row)
    if is_written:
        write_rows(results / f"{of.part}-taus.csv", found)
    return found
