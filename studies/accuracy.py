"""Networks of real accuracy on CIFAR-10: flatness and the test error over epochs, architectures and seeds.

Two architectures with a few seeds each are too few for a τ with an interval, so this part counts and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.families import Family
from studies.markdown import number, percent, picture, table
from studies.measures import LABELS
from studies.tables import read_rows, write_rows
from studies.verdicts import COMPARED

Rows = list[dict[str, Any]]


def curves_of(results: Path, family: Family) -> dict[str, Rows]:
    """Return the rows of every network, in the order of its epochs, by name.

    A row has the network's architecture (``arm``), epoch, numbers of images, losses, errors and ``COMPARED``. Networks
    that are not measured at all epochs of the family are left out.
    """
    losses, measures = (
        {(row["name"], row["snapshot"]): row for row in read_rows(results / f"{family.name}-{part}.csv")}
        for part in ("losses", "measures")
    )
    found = {}
    for configuration in family.configurations:
        keys = [(configuration.name, f"epoch {epoch}") for epoch in family.epochs]
        if not all(key in losses and key in measures for key in keys):
            continue
        found[configuration.name] = [
            {"arm": configuration.arm, "epoch": epoch}
            | {name: float(losses[key][name]) for name in losses[key] if name not in ("name", "snapshot", "epoch")}
            | {name: float(measures[key][name]) for name in COMPARED}
            for key, epoch in zip(keys, family.epochs, strict=True)
        ]
    return found


def analyse(results: Path, family: Family) -> Rows:
    """Return one row for every architecture and epoch, and write them to a CSV file.

    Losses and errors are means over the networks, with the lowest and the largest test error; ``COMPARED`` are
    geometric means.
    """
    networks = list(curves_of(results, family).values())
    found = []
    for arm in dict.fromkeys(rows[0]["arm"] for rows in networks):
        mine = [rows for rows in networks if rows[0]["arm"] == arm]
        for place, epoch in enumerate(family.epochs):
            at = [rows[place] for rows in mine]
            errors = [row["test_error"] for row in at]
            row = {"arm": arm, "epoch": epoch, "networks": len(at), "train_loss": mean(at, "train_loss")}
            row |= {"test_error": mean(at, "test_error"), "low": min(errors), "high": max(errors)}
            row |= {"loss_gap": mean(at, "test_loss") - mean(at, "train_loss")}
            row |= {name: float(np.exp(np.mean([np.log(one[name]) for one in at]))) for name in COMPARED}
            found.append(row)
    if found:
        write_rows(results / f"{family.name}-summary.csv", found)
    return found


def mean(rows: Rows, key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def section(results: Path, family: Family, rows: Rows) -> str:
    """Return the section of the page; ``rows`` are those of :func:`analyse`."""
    networks = curves_of(results, family)
    first = next(iter(networks.values()))[0]
    text = (
        f"{len(networks)} networks of {family.configurations[0].width} to {4 * family.configurations[0].width} "
        f"channels, with BatchNorm: {architectures(rows)}. They are trained for {family.configurations[0].epochs} "
        f"epochs on {first['train_images']:,.0f} images, shifted and mirrored at random, and tested on "
        f"{first['test_images']:,.0f}. The learning rate follows a cosine. Measures of the last convolution are those "
        f"of {family.measured_samples} training images, as they are; the table has their geometric means.\n"
    )
    headings = (
        "network", "epoch", "networks", "training loss", "test error (range)", "loss gap",
        "relative flatness", "normalised", "Hessian trace",
    )  # fmt: skip
    cells = [
        (
            row["arm"], str(row["epoch"]), str(row["networks"]), number(row["train_loss"]),
            f"{percent(row['test_error'])} ({percent(row['low'])} to {percent(row['high'])})",
            number(row["loss_gap"]), *(number(row[name], 1) for name in COMPARED),
        )
        for row in rows
    ]  # fmt: skip
    caption = picture(family.name, "Test error against three measures over the epochs of accurate networks")
    said = "".join(f"- {line}\n" for line in findings(networks, rows))
    return "\n".join(["## CIFAR-10: networks of real accuracy\n", text, table(headings, cells), said, caption])


def architectures(rows: Rows) -> str:
    counts = {row["arm"]: row["networks"] for row in rows}
    return " and ".join(f"{count} of the architecture *{arm}*" for arm, count in counts.items())


def findings(networks: dict[str, Rows], rows: Rows) -> list[str]:
    """Return sentences on what changes together: over the epochs, between architectures, and among seeds."""
    lines = [over_epochs(list(networks.values()))]
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    if len(last) > 1:
        better, worse = sorted(last, key=lambda row: row["test_error"])[:2]
        ratios = ", ".join(f"{LABELS[name]} {number(better[name] / worse[name])}" for name in COMPARED)
        points = number(100 * (worse["test_error"] - better["test_error"]), 1)
        lines.append(
            f"**Between architectures**, at epoch {better['epoch']}: *{better['arm']}* has a test error that is "
            f"{points} points lower than that of *{worse['arm']}*. Its measures are those of *{worse['arm']}* times: "
            f"{ratios}. Below one it is the flatter one, too. Flatness follows the loss, and their training losses are "
            f"{number(better['train_loss'])} and {number(worse['train_loss'])}."
        )
    return [*lines, among_seeds(list(networks.values()))]


def among_seeds(networks: list[Rows]) -> str:
    """Return a sentence that compares the differences between seeds with the noise of the test images."""
    arms = [
        [rows[-1] for rows in networks if rows[0]["arm"] == arm] for arm in {rows[0]["arm"]: 0 for rows in networks}
    ]
    errors = [[row["test_error"] for row in rows] for rows in arms if len(rows) > 1]
    halves = [[(row["test_error_a"] - row["test_error_b"]) / 2 for row in rows] for rows in arms if len(rows) > 1]
    if not errors:
        return "**Among seeds** nothing can be said yet."
    spread, noise = (float(np.sqrt(np.mean([np.var(part, ddof=1) for part in parts]))) for parts in (errors, halves))
    epoch = networks[0][-1]["epoch"]
    text = (
        f"**Among seeds** of one architecture, test errors at epoch {epoch} have a standard deviation of "
        f"{number(100 * spread)} points. The choice of the test images alone makes {number(100 * noise)} (from halves)"
    )
    return (
        f"{text}, so these networks cannot tell whether a measure orders seeds." if spread < 2 * noise else f"{text}."
    )


def over_epochs(networks: list[Rows]) -> str:
    """Return a sentence that counts the networks whose error falls and whose measures rise during training."""
    start, end = networks[0][0]["epoch"], networks[0][-1]["epoch"]
    falls = sum(rows[-1]["test_error"] < rows[0]["test_error"] for rows in networks)
    rises = ", ".join(
        f"{LABELS[name]} in {sum(rows[-1][name] > rows[0][name] for rows in networks)}" for name in COMPARED
    )
    return (
        f"**Over the epochs**, from {start} to {end}, the test error falls in {falls} of {len(networks)} networks. "
        f"These rise meanwhile, which means sharper: {rises}."
    )
