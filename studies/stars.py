"""Compare the arms of a star with its centre: how each hyper-parameter changes flatness, loss gap and test error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.analysis import sample
from studies.families import Family
from studies.markdown import number, table
from studies.verdicts import COMPARED, OURS


def arm_rows(results: Path, family: Family, snapshot: str) -> list[dict[str, Any]]:
    """Compare every arm with the centre at one snapshot, by pairs of networks with the same seed.

    A row has the geometric mean of the ratios of each measure in ``COMPARED``, and the mean changes of loss gap and
    test error. It also has all ratios of relative flatness, and the mean training losses of the arm and of the centre.
    """
    found = sample(results, family, snapshot)
    at = {(row["arm"], row["seed"]): index for index, row in enumerate(found.rows)}
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in found.rows if row["arm"] != "centre"):
        pairs = [(at[arm, seed], at["centre", seed]) for of, seed in at if of == arm and ("centre", seed) in at]
        if not pairs:
            continue
        ours, centre = (np.array(part) for part in zip(*pairs, strict=True))
        row: dict[str, Any] = {"arm": arm.replace("_", " "), "snapshot": snapshot, "pairs": len(pairs)}
        for name in COMPARED:
            ratios = found.column(name)[ours] / found.column(name)[centre]
            row[name] = float(np.exp(np.mean(np.log(ratios))))
            row |= {"ratios": ratios.tolist()} if name == OURS else {}
        for target in ("loss gap", "test error"):
            row[target] = float((found.targets[target][ours] - found.targets[target][centre]).mean())
        loss = found.column("train_loss")
        rows.append(row | {"loss": float(loss[ours].mean()), "centre_loss": float(loss[centre].mean())})
    return rows


def star_table(results: Path, family: Family, snapshot: str) -> str:
    """Return the section with a table of all arms at one snapshot, which also names the arms that are missing."""
    rows = arm_rows(results, family, snapshot)
    cells = [
        (
            row["arm"], str(row["pairs"]), number(row["loss"], 3), *(number(row[name]) for name in COMPARED),
            number(row["loss gap"], 3), number(100 * row["test error"], 1),
        )
        for row in rows
    ]  # fmt: skip
    names = [c.arm.replace("_", " ") for c in family.configurations if c.arm != "centre"]
    missing = [name for name in dict.fromkeys(names) if name not in {row["arm"] for row in rows}]
    text = (
        f"Each arm against the centre, networks of the same seed, at {snapshot}: mean training loss of the arm, geometric "
        "mean of the ratios of three measures of the last convolution, and mean change of loss gap and test error. An arm "
        "that is flatter has ratios below one; it generalises better if gap and error fall. "
    )
    if rows:
        text += f"The centre has a training loss of {number(rows[0]['centre_loss'], 3)}. "
    if missing:
        text += f"Missing, since no network of theirs is counted at {snapshot}: {', '.join(missing)}."
    headings = (
        "arm", "pairs", "training loss", "relative flatness", "normalised", "Hessian trace", "loss gap",
        "test error, points",
    )  # fmt: skip
    return f"### Arms against the centre, at {snapshot}\n\n" + text.rstrip() + "\n\n" + table(headings, cells)
