"""Compare what papers claim with the results of the study."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from studies.analysis import MAIN, MAIN_TARGETS
from studies.findings import coins, told
from studies.markdown import number, table
from studies.verdicts import OURS, TRACE
from studies.words import SHIFTS

Rows = list[dict[str, Any]]

CRITERIA = ("r_e", "k_hn", "c_t", "relative_flatness", "loss")


def over_shifts(shifts: dict[str, Rows]) -> str:
    """Return a text with τ of the criteria over the shifts. It names all data sets but the digits."""
    parts = []
    for part, rows in shifts.items():
        changed = {row["measure"]: row for row in rows}
        text = "; ".join(f"{row['label']} {told(row, 'over_shifts')}" for row in map(changed.get, CRITERIA) if row)
        of = "" if part == "shift" else f" of {SHIFTS[part].data}"
        parts += [f"τ over shifts{of}: {text}"] if text else []
    return (
        ". ".join(parts) + ". The loss and the criteria of the whole network need the labels of the new images"
        if parts
        else "not run"
    )


def claims(found: dict[str, Rows], shifts: dict[str, Rows], star: dict[str, Rows], arms: Rows) -> str:
    """Return the section that compares claims of papers with the results.

    ``found`` and ``star`` are the tables of the digits and of CIFAR-10, and ``arms`` has the rows of ``stars.arm_rows``
    at the last epoch.
    """
    if not found.get("details"):
        return ""
    of, error = (
        {row["measure"]: row for row in found["details"] if row["target"] == target} for target in MAIN_TARGETS
    )
    on_cifar = {(row["measure"], row["target"]): row for row in star.get("details", [])}
    rows = [
        ("Relative flatness goes with the loss gap, and more than the Hessian trace", "Petzka et al. 2021",
         f"Pearson's r {number(of[OURS]['pearson'])} and {number(of[TRACE]['pearson'])}, over all noise levels together"
         + cifar_words(on_cifar, "pearson", (OURS, TRACE))),
        ("Relative flatness of convolutions is a robust tool to compare CNNs", "Taleghani et al. 2026",
         f"sign error {number(of[OURS]['sign_error'])} in the mean, {number(of[OURS]['worst_sign_error'])} in the worst "
         "environment; a coin has 0.5" + cifar_words(on_cifar, "granulated", (OURS,), "granulated τ ")),
        ("Perturbations relative to the weights are among the best measures", "Jiang et al. 2020",
         f"granulated τ: ASAM {grains(of['asam'])}, relative perturbation {grains(of['random_relative'])}, relative "
         f"flatness {grains(of[OURS])}. With the test error: ASAM {grains(error['asam'])}, relative flatness "
         f"{grains(error[OURS])}. Our radii are fixed; the paper searches for them"),
        ("No measure beats a coin in its worst environment", "Dziugaite et al. 2020",
         coins(list(of.values()))),
        ("Sharpness follows the learning rate", "Andriushchenko et al. 2023",
         f"τ with learning rate over batch size: Hessian trace {number(of[TRACE]['with_rate_over_batch'])}, relative "
         f"flatness {number(of[OURS]['with_rate_over_batch'])}"),
        ("Takeuchi's criterion predicts the gap", "Thomas et al. 2020",
         f"τ {number(of['takeuchi']['tau'])}, of the classifier alone"),
        ("When the data change, Hessian criteria change with the accuracy", "Gabdullin 2024",
         over_shifts(shifts)),
        ("Flatness grows with SAM and augmentation although networks get better", "arXiv 2510.12451",
         grown(arms)),
    ]  # fmt: skip
    text = (
        f"What the digits say, at {MAIN} and of the loss gap unless the table says otherwise. One family proves no paper "
        "right or wrong.\n"
    )
    return "## What papers say\n\n" + text + "\n" + table(("claim", "source", "here"), rows, left=3)


def grains(row: dict[str, Any]) -> str:
    return f"{number(row['granulated'])} ({number(row['granulated_within'])} without steps in label noise)"


def cifar_words(rows: dict[tuple[str, str], dict[str, Any]], key: str, names: Iterable[str], what: str = "") -> str:
    """Return what CIFAR-10 says to a claim about both targets, or an empty text without results."""
    if not rows:
        return ""
    said = [
        f"{' and '.join(number(rows[name, target][key]) for name in names)} with the {target}"
        for target in MAIN_TARGETS
    ]
    return f". On CIFAR-10 {what}{', '.join(said)}"


def grown(star: Rows) -> str:
    """Return what SAM and augmentation change on CIFAR-10 at the last epoch."""
    found = [row for row in star if row["arm"] in ("optimizer sam", "augment True")]
    if not found:
        return "not examined: it needs the star on CIFAR-10"
    parts = [
        f"{row['arm']}: relative flatness {number(row[OURS])} times (pair by pair {', '.join(map(number, row['ratios']))}), "
        f"test error {number(100 * row['test error'], 1)} points, training loss {number(row['loss'], 3)} against "
        f"{number(row['centre_loss'], 3)}"
        for row in found
    ]
    return f"CIFAR-10, {found[0]['snapshot']}, against the centre: {'; '.join(parts)}"
