"""Distorted digits: does a measure change together with the accuracy when the test images are distorted?

As in the papers on Hessian criteria (Gabdullin 2024, 2025), the networks stay the same and the data change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from studies.data import Data, shifted
from studies.families import Configuration, digits, stacks
from studies.measuring import error_of, logits_of, network_of, spectrum_of
from studies.running import Settings, load, measure_all
from studies.statistics import DRAWS, tau
from studies.tables import Table, column_of, read_rows, write_rows
from studies.training import Run, Snapshot

SNAPSHOT = "epoch 120"
MEASURED = 200  # number of test images that measures are computed on
CLEAN = "clean"
SHIFTS = ("moved", "rotated", "small", "blurred", "noisy", "faint")
# With these signs, a positive τ is expected: the signed measure rises where the accuracy falls.
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


def networks() -> list[Configuration]:
    """Return the configurations to measure: one seed, no weight decay, two batch sizes, two learning rates."""
    every = (c for c in digits().configurations if not c.seed and not c.weight_decay)
    return [c for c in every if c.batch_size in (10, 100) and c.learning_rate in (0.02, 0.2)]


class Worker:
    """The state and the tasks of a worker process, with the test images, clean and distorted."""

    data: Data
    images: dict[str, torch.Tensor]

    @classmethod
    def begin(cls, settings: Settings) -> None:
        if settings.jobs > 1:
            torch.set_num_threads(1)
        cls.data = load("digits", settings)
        cls.images = {CLEAN: cls.data.test_images, **shifted(cls.data.test_images)}

    @classmethod
    def measure(cls, name: str, kind: str, configuration: Configuration, snapshot: Snapshot) -> dict[str, Any]:
        model, images, labels = network_of(configuration, snapshot, cls.data), cls.images[kind], cls.data.test_labels
        logits = logits_of(model, images)
        batches = [(images[:MEASURED], labels[:MEASURED])]
        report = lf.measure_flatness(model, batches, progress=False)
        found = {"error": error_of(logits, labels), "loss": float(cross_entropy(logits, labels))}
        found["confidence"] = float(logits.softmax(1).amax(1).mean())
        flatness = ("hessian_trace", "relative_flatness", "normalized_relative_flatness")
        found |= {measure: float(getattr(report, measure)) for measure in flatness}
        return {"name": name, "shift": kind} | found | spectrum_of(model, batches)


def run(settings: Settings, console: Console) -> None:
    """Measure the networks and shifts that are not in the table; train networks again if their weights are gone."""
    family, wanted = digits(), {c.name: c for c in networks()}
    table = Table(settings.results / "shift.csv", "name", "shift")
    kinds = (CLEAN, *SHIFTS)
    missing = {name for name in wanted for kind in kinds if (name, kind) not in table}
    data, tasks = load("digits", settings), []
    for number, stack in enumerate(stacks(family)):
        if any(c.name in missing for c in stack):
            saved = settings.work / family.name / f"stack-{number:03d}.pt"
            snapshots = Run(family, stack, data, settings.device).train(saved) or []
            tasks += [
                (one.name, kind, wanted[one.name], one)
                for one in snapshots
                if one.snapshot == SNAPSHOT and one.name in missing
                for kind in kinds
            ]
    measure_all(tasks, Worker.measure, Worker.begin, settings, table, console, "networks and shifts")


def analyse(results: Path, seed: int = 0, is_written: bool = True) -> list[dict[str, Any]]:
    """Return Kendall's τ between changes of each measure and changes of the error, over shifts and over networks."""
    rows = read_rows(results / "shift.csv")
    names = sorted({row["name"] for row in rows})
    at = {(row["name"], row["shift"]): row for row in rows}
    names = [name for name in names if all((name, kind) in at for kind in (CLEAN, *SHIFTS))]
    if len(names) < 5:
        return []
    by_kind = {kind: [at[name, kind] for name in names] for kind in (CLEAN, *SHIFTS)}

    def change(measure: str, sign: int) -> np.ndarray:
        clean = column_of(by_kind[CLEAN], measure)
        return sign * np.stack([column_of(by_kind[kind], measure) - clean for kind in SHIFTS])  # (shifts, networks)

    error, found = change("error", 1), []
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    for measure, (label, sign) in MEASURES.items():
        of = change(measure, sign)
        within = np.array([tau(of[:, i], error[:, i]) for i in range(len(names))])
        low, high = np.quantile(np.nanmean(within[drawn], axis=1), [0.025, 0.975])
        across = [tau(of[i], error[i]) for i in range(len(SHIFTS))]
        row = {"measure": measure, "label": label, "networks": len(names), "shifts": len(SHIFTS)}
        row |= {"over_shifts": float(np.nanmean(within)), "low": float(low), "high": float(high)}
        row |= {"over_networks": float(np.nanmean(across))}
        row |= {"over_networks_low": float(np.nanmin(across)), "over_networks_high": float(np.nanmax(across))}
        found.append(row)
    if is_written:
        write_rows(results / "shift-taus.csv", found)
    return found
