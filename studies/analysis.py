"""Compute the numbers of the page from the measured tables of a family, and write them to CSV files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from studies.families import Family
from studies.measures import BASELINES, LABELS, NEGATED, PACKAGE
from studies.statistics import (
    LEVEL,
    Pair,
    Resampled,
    constant_rule,
    environments,
    given,
    granulated,
    holm,
    matched,
    pairs_of,
    reliability,
    resampled,
    tau,
    weighted_taus,
)
from studies.tables import column_of, read_rows, shown, write_rows

Array = np.ndarray
TARGETS = ("loss gap", "accuracy gap", "test error", "scaled test loss")
MAIN_TARGETS = ("loss gap", "test error")
MAIN = "loss 0.05"
SCOPES = ("all networks", "within noise levels")
NEAR = 0.5  # a network counts at "loss 0.05" only if its training loss there is at least this share of 0.05
REFERENCES = (*BASELINES, "hessian_trace.last")  # the numbers that each measure of the package is compared with


@dataclass(frozen=True)
class Sample:
    """All networks of a family at one snapshot: ``m`` measures, and the targets that the measures should predict.

    There is one row for each of the ``n`` networks. ``targets`` are ``(n,)`` each, and ``halves`` holds every target on
    two halves of the test images.
    """

    snapshot: str
    rows: list[dict[str, str]]
    names: list[str]
    measures: Array  # (m, n), with signs such that a positive τ with the target is expected
    targets: dict[str, Array]
    halves: dict[str, tuple[Array, Array]]
    left_out: int  # networks with this snapshot that do not count: the loss is too far below, or a number is missing

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Array:
        return self.measures[self.names.index(name)]

    @property
    def clusters(self) -> list[str]:
        """The configuration of every network without its seed, as a string."""
        return ["|".join(v for k, v in row.items() if k not in ("name", "seed", "snapshot")) for row in self.rows]

    @property
    def same_noise(self) -> Array:
        noise = column_of(self.rows, "label_noise")
        return (noise[:, None] == noise[None, :]).astype(float)


def sample(results: Path, family: Family, snapshot: str) -> Sample:
    """Read the configurations, measures and targets of a family's networks at one snapshot."""
    configurations = {c.name: {key: shown(value) for key, value in c.row().items()} for c in family.configurations}
    losses = {
        row["name"]: row
        for row in read_rows(results / f"{family.name}-losses.csv")
        if row["snapshot"] == snapshot and row["name"] in configurations
    }
    measures = {
        row["name"]: row for row in read_rows(results / f"{family.name}-measures.csv") if row["snapshot"] == snapshot
    }
    names = [name for name in configurations if name in losses and name in measures]
    of_losses, of_measures = [losses[name] for name in names], [measures[name] for name in names]
    columns = {
        key: column_of(of_losses if key.startswith("train_") else of_measures, key) * (-1 if key in NEGATED else 1)
        for key in LABELS
    }
    known = {key: values for key, values in columns.items() if names and np.isnan(values).mean() < 0.1}
    keep = np.ones(len(names), dtype=bool)
    for values in known.values():
        keep &= ~np.isnan(values)
    if snapshot.startswith("loss"):
        keep &= column_of(of_losses, "train_loss") >= NEAR * float(snapshot.split()[1])
    of_losses = [row for row, kept in zip(of_losses, keep, strict=True) if kept]
    loss = {
        key: column_of(of_losses, key) for key in (of_losses[0] if of_losses else ()) if key not in ("name", "snapshot")
    }
    targets, halves = {}, {}
    if of_losses:
        train_loss, train_error = loss["train_loss"], loss["train_error"]
        by_part = {
            part: {
                "loss gap": loss[f"test_loss{part}"] - train_loss,
                "accuracy gap": loss[f"test_error{part}"] - train_error,
                "test error": loss[f"test_error{part}"],
                "scaled test loss": loss[f"scaled_loss{part}"],
            }
            for part in ("", "_a", "_b")
        }
        targets = by_part[""]
        halves = {target: (by_part["_a"][target], by_part["_b"][target]) for target in TARGETS}
    return Sample(
        snapshot,
        [configurations[row["name"]] for row in of_losses],
        list(known),
        np.stack([values[keep] for values in known.values()]) if known else np.zeros((0, 0)),
        targets,
        halves,
        int((~keep).sum()),
    )


def analyse(results: Path, family: Family, seed: int = 0, is_written: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Compute all tables of a family; write each table to ``<family>-<table>.csv`` if ``is_written``.

    ``seed`` is the seed of the bootstrap.
    """
    samples = [sample(results, family, snapshot) for snapshot in family.snapshots]
    samples = [one for one in samples if len(one) >= 10]
    found = {
        "reached": [counts(one, family) for one in samples],
        "reliability": [row for one in samples for row in reliabilities(one)],
        "taus": [],
        "differences": [],
    }
    for one in samples:
        for target in TARGETS:
            for scope in SCOPES:
                pairs = one.same_noise if scope != SCOPES[0] else None
                of_target = resampled(one.measures, one.targets[target], one.clusters, seed, pairs)
                key = {"snapshot": one.snapshot, "target": target, "scope": scope, "n": len(one)}
                found["taus"] += tau_rows(key, one, of_target)
                if one.snapshot == MAIN and target in MAIN_TARGETS:
                    found["differences"] += difference_rows(key, one, of_target)
    corrected(found["taus"])
    corrected(found["differences"])
    main = [one for one in samples if one.snapshot == MAIN]
    found["known"] = [row for one in main for target in MAIN_TARGETS for row in known_before(one, target)]
    last = [one for one in samples if one.snapshot == family.snapshots[-1]]
    found["levels"] = [row for one in main + last for target in MAIN_TARGETS for row in by_noise(one, target)]
    found["details"] = [row for one in main for target in MAIN_TARGETS for row in details(one, target, family)]
    found["pairs"] = [row for one in main for row in matched_rows(one, family)]
    if is_written:
        for name, rows in found.items():
            if rows:
                write_rows(results / f"{family.name}-{name}.csv", rows)
    return found


def counts(one: Sample, family: Family) -> dict[str, Any]:
    row: dict[str, Any] = {"snapshot": one.snapshot, "of": len(family.configurations), "n": len(one)}
    row["left_out"] = one.left_out
    row["never"] = len(family.configurations) - len(one) - one.left_out
    row["configurations"] = len(set(one.clusters))
    loss = one.column("train_loss")
    row |= {"train_loss_low": float(loss.min()), "train_loss_high": float(loss.max())}
    error = one.targets["test error"]
    return row | {"test_error_low": float(error.min()), "test_error_high": float(error.max())}


def reliabilities(one: Sample) -> list[dict[str, Any]]:
    clean = column_of(one.rows, "label_noise") == 0
    rows = []
    for target, (first, second) in one.halves.items():
        for scope, chosen in (("all networks", np.ones_like(clean)), ("no label noise", clean)):
            if chosen.sum() >= 10:
                of = reliability(first[chosen], second[chosen])
                key = {"snapshot": one.snapshot, "target": target, "scope": scope, "n": int(chosen.sum())}
                rows.append(key | {"tau": of.tau, "whole": of.whole, "noise": of.noise})
    return rows


def tau_rows(key: dict[str, Any], one: Sample, of_target: Resampled) -> list[dict[str, Any]]:
    of = of_target.estimate()
    return [
        key | {"measure": name, "tau": float(of.values[i]), "low": float(of.low[i]), "high": float(of.high[i]),
               "error": float(of.errors[i]), "p": float(of.p[i])}
        for i, name in enumerate(one.names)
    ]  # fmt: skip


def difference_rows(key: dict[str, Any], one: Sample, of_target: Resampled) -> list[dict[str, Any]]:
    """Return the differences in τ between each measure of the package and each of ``REFERENCES``."""
    rows = []
    for reference in (name for name in REFERENCES if name in one.names):
        of = of_target.minus(one.names.index(reference))
        for i, name in enumerate(one.names):
            if name in PACKAGE and name != reference:
                values = {"difference": of.values[i], "low": of.low[i], "high": of.high[i], "p": of.p[i]}
                pair = {"measure": name, "reference": reference}
                rows.append(key | pair | {k: float(v) for k, v in values.items()})
    return rows


def corrected(rows: list[dict[str, Any]]) -> None:
    """Add a column ``p_holm`` of p-values that are corrected for the number of rows."""
    for row, p in zip(rows, holm(np.array([row["p"] for row in rows])), strict=True):
        row["p_holm"] = float(p)


def is_clear(row: dict[str, Any]) -> bool:
    """Return whether the number in a row differs significantly from zero, by its corrected p-value."""
    return float(row["p_holm"] or "nan") < LEVEL


def family_pairs(one: Sample, family: Family) -> list[Pair]:
    return pairs_of(one.rows, family.factors)


def details(one: Sample, target: str, family: Family) -> list[dict[str, Any]]:
    """Return one row for every measure: partial and granulated τ, sign errors in environments, Pearson's r.

    ``studies/statistics.py`` defines granulated τ, sign errors and environments.
    """
    y, noise = one.targets[target], reliability(*one.halves[target]).noise
    ratio, label_noise = rate_over_batch(one), column_of(one.rows, "label_noise")
    held = {"train_loss": one.column("train_loss"), "weight_norm": one.column("weight_norm"), "rate_over_batch": ratio}
    held["label_noise"] = label_noise
    settings = [tuple(row[factor] for factor in family.factors) for row in one.rows]
    clean = [tuple(row[factor] for factor in family.factors if factor != "label_noise") for row in one.rows]
    seeds, pairs = [row["seed"] for row in one.rows], family_pairs(one, family)
    fewest = 10 if family.name == "digits" else 5
    constant = constant_rule(y, pairs, noise, fewest)
    rows = []
    for name, x in zip(one.names, one.measures, strict=True):
        row: dict[str, Any] = {"measure": name, "target": target, "n": len(one), "tau": tau(x, y)}
        row |= {f"given_{key}": given(x, y, z) if key != name else float("nan") for key, z in held.items()}
        row["with_rate_over_batch"] = tau(x, ratio)
        row["granulated"] = granulated(x, y, settings, seeds)
        row["granulated_within"] = granulated(x, y, clean, list(zip(seeds, label_noise, strict=True)))
        of = environments(x, y, pairs, noise, fewest)
        row |= {"sign_error": of.mean, "worst_sign_error": of.worst, "worst_where": of.where}
        row["worst_pairs"] = of.worst_pairs
        row["worst_p"] = float("nan")
        if of.worst_pairs:
            wrong = round(of.worst * of.worst_pairs)
            row["worst_p"] = float(stats.binomtest(wrong, of.worst_pairs, alternative="less").pvalue)
        row |= {"environments": of.number, "environment_pairs": of.pairs, "all_pairs": len(pairs)}
        row["constant_rule"] = constant
        row["pearson"] = pearson(x, y)
        row["pearson_log"] = pearson(np.log(x), y) if (x > 0).all() else float("nan")
        rows.append(row)
    return rows


def rate_over_batch(one: Sample) -> Array:
    return column_of(one.rows, "learning_rate") / column_of(one.rows, "batch_size")


def known_before(one: Sample, target: str) -> list[dict[str, Any]]:
    """Return τ of a target with settings that are known before training, over all networks and within noise levels.

    A setting that has one value only is left out.
    """
    settings = {key: column_of(one.rows, key) for key in ("label_noise", "learning_rate", "batch_size", "weight_decay")}
    settings |= {"train_size": column_of(one.rows, "train_size"), "rate_over_batch": rate_over_batch(one)}
    y, ones = one.targets[target], np.ones((1, len(one)))
    rows = []
    for name, x in settings.items():
        if np.ptp(x) == 0:
            continue
        whole, within = (float(weighted_taus(x[None], y, ones, pairs)[0, 0]) for pairs in (None, one.same_noise))
        rows.append({"target": target, "n": len(one), "setting": name, "tau": whole, "tau_within": within})
    return rows


def by_noise(one: Sample, target: str) -> list[dict[str, Any]]:
    """Return τ of every number with a target among the networks of one noise level, for levels with ten or more."""
    noise, rows = column_of(one.rows, "label_noise"), []
    for level in sorted(set(noise)):
        mine = noise == level
        if mine.sum() >= 10:
            key = {"snapshot": one.snapshot, "target": target, "label_noise": float(level), "n": int(mine.sum())}
            for name, x in zip(one.names, one.measures, strict=True):
                rows.append(key | {"measure": name, "tau": tau(x[mine], one.targets[target][mine])})
    return rows


def pearson(x: Array, y: Array) -> float:
    if not np.isfinite(x).all() or np.ptp(x) == 0:
        return float("nan")
    return float(stats.pearsonr(x, y).statistic)


def matched_rows(one: Sample, family: Family) -> list[dict[str, Any]]:
    """Count how often label noise makes each measure and target larger.

    Each pair consists of two networks that differ in label noise alone: the lowest level and the highest.
    """
    pairs = family_pairs(one, family)
    noise = sorted({row["label_noise"] for row in one.rows}, key=float)
    if len(noise) < 2:
        return []
    where = f"label_noise {noise[0]} to {noise[-1]}"
    columns = dict(zip(one.names, one.measures, strict=True)) | one.targets
    rows = []
    for name, x in columns.items():
        larger, number = matched(x, pairs, where)
        p = float(stats.binomtest(larger, number).pvalue) if number else float("nan")
        rows.append({"number": name, "environment": where, "larger": larger, "pairs": number, "p": p})
    return rows
