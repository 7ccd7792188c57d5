"""Compare the arms of a star with its centre: how each hyper-parameter changes flatness, loss gap and test error."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from studies.analysis import MAIN, sample
from studies.families import Family
from studies.markdown import number, table
from studies.verdicts import NORMALISED, OURS, TRACE


def star_table(results: Path, family: Family, snapshot: str = MAIN) -> str:
    """Return the section with a table of all arms.

    Every network of an arm is compared with the network of the centre that has the same seed: measures by their ratio,
    targets by their difference.
    """
    found = sample(results, family, snapshot)
    at = {(row["arm"], row["seed"]): index for index, row in enumerate(found.rows)}
    arms = list(dict.fromkeys(row["arm"] for row in found.rows if row["arm"] != "centre"))
    cells = []
    for arm in arms:
        pairs = [(at[arm, seed], at["centre", seed]) for of, seed in at if of == arm and ("centre", seed) in at]
        if not pairs:
            continue
        ours, centre = (np.array(part) for part in zip(*pairs, strict=True))
        ratios = [
            float(np.exp(np.mean(np.log(found.column(name)[ours] / found.column(name)[centre]))))
            for name in (OURS, NORMALISED, TRACE)
        ]
        gap, error = (
            float((found.targets[target][ours] - found.targets[target][centre]).mean())
            for target in ("loss gap", "test error")
        )
        changes = [*(number(ratio) for ratio in ratios), number(gap, 3), number(100 * error, 1)]
        cells.append((arm.replace("_", " "), str(len(pairs)), *changes))
    text = (
        f"Each arm against the centre, networks of the same seed, at {snapshot}: geometric mean of the ratios of three "
        "measures of the last convolution, and mean change of loss gap and test error. An arm that is flatter has ratios "
        "below one; it generalises better if gap and error fall.\n"
    )
    headings = ("arm", "pairs", "relative flatness", "normalised", "Hessian trace", "loss gap", "test error, points")
    return "### Arms against the centre\n\n" + text + "\n" + table(headings, cells)
