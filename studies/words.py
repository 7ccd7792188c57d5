"""The texts of the page around its tables, and a summary of the results whose sentences depend on the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studies.analysis import MAIN, SCOPES, is_clear
from studies.markdown import number, table
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.verdicts import NORMALISED, OURS, TRACE, beats, chosen

Rows = list[dict[str, Any]]

HEAD = """# Does flatness predict generalisation?

You want to know what a flatness measure tells about how a network does on new data. This page is the answer of an
experiment that anyone can repeat: `make study` trains and measures the networks, analyses them and writes this page.
`make study-cifar ARRAYS=folder` adds CIFAR-10. All numbers come from the CSV files in `studies/results`, by
`python -m studies page`.

How it avoids flattering the package:

- All measures are shown, at all snapshots and with all targets, baselines first. None was left out for its result.
- The main snapshot, the main targets and the sign that each number is expected to have were fixed in the code before
  any result was seen. Networks are compared at equal *training* loss, since flatness follows the loss.
- Errors count configurations, not networks: seeds of one configuration are not independent evidence.
- p-values are corrected for the number of values looked at (Holm), and the best baseline is found by looking, which
  makes it harder for the package.
"""

FOUND = "## What was found\n\n"

DIGITS_WORDS = """Plain CNNs of three convolutions with BatchNorm, 12 to 24 channels, on 200 of scikit-learn's 1,797 digits;
the other 1,597 are the test images. Batch size (10, 25, 100) x learning rate (0.02, 0.05, 0.1, 0.2) x weight decay
(0, 0.001) x label noise (0, 10, 20 % of the labels wrong), three seeds each: 216 networks, SGD with momentum 0.9 and a
constant learning rate, 120 epochs. Measures and baselines are those of the 200 training images with the labels that
were trained on. Eigenvalues and the spectrum of the whole network (20 Lanczos steps, 2 probes) are measured at one
snapshot only, since they take the longest."""

STAR_WORDS = """A plain CNN with BatchNorm, of four convolutions with 16 to 64 channels, on 1,000 images, and arms that
change one hyper-parameter each, three seeds; 5,000 or 10,000 test images. Measures are those of 256 training images. The
networks are small and see few images, so their accuracy is far below what CIFAR-10 allows."""


@dataclass(frozen=True)
class ShiftWords:
    """The words of a section on distorted images: the data, which networks, and more about the images."""

    data: str
    networks: str
    images: str = ""


SHIFTS = {
    "shift": ShiftWords("Digits", "the digits' networks (one seed, no weight decay)"),
    "shift-cifar": ShiftWords(
        "CIFAR-10",
        "the star's networks (one seed; the centre, and an arm each for most hyper-parameters)",
        "*Small* images are scaled down on a black canvas, *coarse* ones are brought to half the resolution and enlarged "
        "again, *faint* ones have less contrast. ",
    ),
}

BELOW = """## Limits

- The networks are small, the digits are easy, and all of them are image CNNs with ReLU. Nothing here is about
  transformers, language, or networks of millions of weights.
- Choosing which hyper-parameters differ, and over which range, decides much about every τ. Batch size, learning rate
  and label noise act on flatness and on generalisation at once; *within noise levels*, *granulated* and *given lr/batch*
  take some of that out, not all.
- A snapshot at a loss is taken when the loss is first reached. The order at convergence may differ: see the snapshots at
  fixed epochs.
- Measures are those of the training images. Test images would tell more, and need the very images whose error is to be
  predicted.
- Another machine rounds otherwise, so its networks are others. Its numbers agree with these within the intervals, not
  to the digit.

## Sources

Petzka et al. 2021 (arXiv 2001.00939), relative flatness and the protocol with Pearson's r · Jiang et al. 2020 (arXiv
1912.02178), granulated τ, random perturbations · Dziugaite et al. 2020 (arXiv 2010.11924), worst environments · Liang et
al. 2019 (arXiv 1711.01530), Fisher–Rao norm · Thomas et al. 2020 (arXiv 1906.07774), Takeuchi criterion · Foret et al.
2021 (arXiv 2010.01412), SAM · Kwon et al. 2021 (arXiv 2102.11600), ASAM · Gabdullin 2024 (arXiv 2412.10146) and 2025
(arXiv 2504.17618), r_e, K_Hn, C_t and changes of the data · Guo et al. 2017 (arXiv 1706.04599), temperature · Holm 1979.
"""


def findings(found: dict[str, Rows]) -> str:
    """Return a Markdown list that summarises the results on the digits."""
    if not found.get("verdicts"):
        return "The digits have not been run yet.\n"
    lines = [about(found, target, scope) for target in ("loss gap", "test error") for scope in SCOPES]
    lines += [held(found), worst(found), at_the_end(found), noisy(found["pairs"])]
    return "".join(f"- {line}\n" for line in lines if line)


def star_findings(found: dict[str, Rows], done: int, planned: int) -> str:
    """Return items of a Markdown list that summarise the results on CIFAR-10, or an empty text without results.

    ``done`` is the number of networks that have been run, and ``planned`` the number of all networks of the star.
    """
    if not found.get("verdicts"):
        return ""
    so_far = f"so far {done} of {planned} networks" if done < planned else f"{planned} networks"
    lines = [about(found, target, SCOPES[0]) for target in ("loss gap", "test error")]
    return "".join(f"- CIFAR-10, {so_far}. {line}\n" for line in lines)


def told(row: dict[str, Any], key: str = "tau") -> str:
    return f"{number(row[key])} [{number(row['low'])}, {number(row['high'])}]"


def about(found: dict[str, Rows], target: str, scope: str) -> str:
    """Return a paragraph on τ of relative flatness and of the trace, and on measures against the best baseline."""
    taus = {row["measure"]: row for row in chosen(found["taus"], target, scope)}
    beside = {(row["measure"], row["reference"]): row for row in chosen(found["differences"], target, scope)}
    best = max((name for name in BASELINES if name in taus), key=lambda name: taus[name]["tau"])
    first = max((name for name in PACKAGE if name in taus), key=lambda name: taus[name]["tau"])
    above = sum(beats(beside, name, best) for name in PACKAGE)
    below = sum(beats(beside, name, best, -1) for name in PACKAGE)
    count = sum(name in PACKAGE for name in taus)
    difference = beside[OURS, TRACE]
    clear = "clear" if is_clear(difference) else "not clear after the correction for all that was looked at"
    return (
        f"**{target.capitalize()}, {scope}, at {MAIN}** ({taus[OURS]['n']} networks): τ of relative flatness of the last "
        f"convolution is {told(taus[OURS])}, of its normalised form {told(taus[NORMALISED])}, of the Hessian trace of the "
        f"same layer {told(taus[TRACE])}; relative flatness minus trace is {told(difference, 'difference')}, which is "
        f"{clear}. The best baseline is {LABELS[best]}, {told(taus[best])}; the measure with the largest τ is "
        f"{LABELS[first]}, {told(taus[first])}. Of {count} measures {above} are clearly better than this baseline, and "
        f"{below} clearly worse."
    )


def held(found: dict[str, Rows]) -> str:
    """Return a paragraph on partial and granulated τ of relative flatness."""
    of = {row["target"]: row for row in found["details"] if row["measure"] == OURS}
    gap, error = of["loss gap"], of["test error"]
    return (
        "**What is left of it.** Relative flatness and the loss gap: given the training loss "
        f"{number(gap['given_train_loss'])}, given the weight norm {number(gap['given_weight_norm'])}, given learning rate "
        f"over batch size {number(gap['given_rate_over_batch'])}, granulated {number(gap['granulated'])}. And the test "
        f"error: {number(error['given_train_loss'])}, {number(error['given_weight_norm'])}, "
        f"{number(error['given_rate_over_batch'])}, {number(error['granulated'])}. Its τ with learning rate over batch size "
        f"itself is {number(gap['with_rate_over_batch'])}."
    )


def worst(found: dict[str, Rows]) -> str:
    """Return a paragraph on how many numbers are no better than a coin in their worst environment."""
    rows = [row for row in found["details"] if row["target"] == "loss gap"]
    failing = [row for row in rows if row["worst_sign_error"] >= 0.5]
    ours = next(row for row in rows if row["measure"] == OURS)
    return (
        f"**In the worst environment** {len(failing)} of {len(rows)} numbers are no better than a coin at telling which of two "
        f"networks has the larger loss gap. Relative flatness has a sign error of {number(ours['worst_sign_error'])} there "
        f"({ours['worst_where'].replace('_', ' ')}), and {number(ours['sign_error'])} in the mean."
    )


def at_the_end(found: dict[str, Rows]) -> str:
    """Return a paragraph on τ of training loss and relative flatness at the last epoch."""
    last = [row["snapshot"] for row in found["taus"]][-1]
    rows = {
        row["measure"]: row
        for row in found["taus"]
        if (row["snapshot"], row["target"], row["scope"]) == (last, "loss gap", SCOPES[0])
    }
    return (
        f"**At a fixed number of epochs** ({last}), where training losses differ, τ with the loss gap is "
        f"{told(rows[OURS])} for relative flatness and {told(rows['train_loss'])} for the training loss itself."
    )


def noisy(rows: Rows) -> str:
    """Return a sentence on how often label noise raises relative flatness and the trace."""
    of = {row["number"]: row for row in rows}
    if not of:
        return ""
    ours, trace = of[OURS], of[TRACE]
    return (
        f"**Label noise** raises relative flatness in {ours['larger']} of {ours['pairs']} matched pairs, and the Hessian "
        f"trace in {trace['larger']}, at equal training loss."
    )


CRITERIA = ("r_e", "k_hn", "c_t", "relative_flatness")


def over_shifts(shifts: dict[str, Rows]) -> str:
    """Return a text with τ of the criteria over the shifts. It names all data sets but the digits."""
    parts = []
    for part, rows in shifts.items():
        changed = {row["measure"]: row for row in rows}
        text = "; ".join(f"{row['label']} {told(row, 'over_shifts')}" for row in map(changed.get, CRITERIA) if row)
        of = "" if part == "shift" else f" of {SHIFTS[part].data}"
        parts += [f"τ over shifts{of}: {text}"] if text else []
    return ". ".join(parts) or "not run"


def claims(found: dict[str, Rows], shifts: dict[str, Rows]) -> str:
    """Return the section that compares claims of papers with the results on the digits."""
    if not found.get("details"):
        return ""
    of = {row["measure"]: row for row in found["details"] if row["target"] == "loss gap"}
    failing = sum(row["worst_sign_error"] >= 0.5 for row in of.values())
    rows = [
        ("Relative flatness goes with the loss gap, and more than the Hessian trace", "Petzka et al. 2021",
         f"Pearson's r {number(of[OURS]['pearson'])} and {number(of[TRACE]['pearson'])}"),
        ("Relative flatness of convolutions is a robust tool to compare CNNs", "Taleghani et al. 2026",
         f"sign error {number(of[OURS]['sign_error'])} in the mean, {number(of[OURS]['worst_sign_error'])} in the worst "
         "environment; a coin has 0.5"),
        ("Perturbations relative to the weights are among the best measures", "Jiang et al. 2020",
         f"granulated τ: ASAM {number(of['asam']['granulated'])}, relative perturbation "
         f"{number(of['random_relative']['granulated'])}, relative flatness {number(of[OURS]['granulated'])}"),
        ("No measure beats a coin in its worst environment", "Dziugaite et al. 2020",
         f"{failing} of {len(of)} do not, {len(of) - failing} do, in the environments of this factorial"),
        ("Sharpness follows the learning rate", "Andriushchenko et al. 2023",
         f"τ with learning rate over batch size: Hessian trace {number(of[TRACE]['with_rate_over_batch'])}, relative "
         f"flatness {number(of[OURS]['with_rate_over_batch'])}"),
        ("Takeuchi's criterion predicts the gap", "Thomas et al. 2020",
         f"τ {number(of['takeuchi']['tau'])}, of the classifier alone"),
        ("When the data change, Hessian criteria change with the accuracy", "Gabdullin 2024",
         over_shifts(shifts)),
        ("Flatness grows with SAM and augmentation although networks get better", "arXiv 2510.12451",
         "not examined: it needs the star on CIFAR-10"),
    ]  # fmt: skip
    text = f"What the digits say, at {MAIN} and of the loss gap unless the table says otherwise. One family proves no paper right or wrong.\n"
    return "## What papers say\n\n" + text + "\n" + table(("claim", "source", "here"), rows, left=3)
