"""The texts of the page around its tables, and a summary of the results whose sentences depend on the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from studies.analysis import MAIN, MAIN_TARGETS, SCOPES
from studies.markdown import interval, number, table
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.statistics import LEVEL
from studies.verdicts import OURS, TRACE, chosen, counted, sign_of

Rows = list[dict[str, Any]]

HEAD = """# Does flatness predict generalisation?

You want to know what a flatness measure tells about how a network does on new data. This page is the answer of an
experiment that anyone can repeat: `make study RESULTS=folder` trains and measures the networks anew, analyses them and
writes this page. Without `RESULTS` it takes the tables that are in `studies/results`, and measures what is missing there.
`make study-cifar ARRAYS=folder` does the same for CIFAR-10. All numbers come from these tables, by `python -m studies page`.

How it avoids flattering the package:

- All measures are shown with all targets, baselines first, at all snapshots; those that take longest, and the
  channel-wise ones, are measured at the main snapshot only. None was left out for its result.
- The main snapshot, the main targets and the sign that each number is expected to have were fixed in the code before
  any result was seen. Networks are compared at equal *training* loss, since flatness follows the loss.
- Errors count configurations, not networks: seeds of one configuration are not independent evidence.
- The best baseline is found by looking, which makes it harder for the package.
- p-values are corrected for the number of values looked at (Holm). The correction hides what speaks for the package,
  and what speaks against it, so the counts without it are given as well.
- What was added after the results had been seen: τ given the label noise, granulated τ without steps in label noise,
  settings known before training, and τ by noise level.
"""

FOUND = "## What was found\n\n"

DIGITS_WORDS = """Plain CNNs of three convolutions with BatchNorm, 12 to 24 channels, on 200 of scikit-learn's 1,797 digits;
the other 1,597 are the test images. Batch size (10, 25, 100) x learning rate (0.02, 0.05, 0.1, 0.2) x weight decay
(0, 0.001) x label noise (0, 10, 20 % of the labels wrong), three seeds each: 216 networks, SGD with momentum 0.9 and a
constant learning rate, 120 epochs. Measures and baselines are those of the 200 training images with the labels that
were trained on. Eigenvalues and the spectrum of the whole network (20 Lanczos steps, 2 probes) are measured at one
snapshot only, since they take the longest."""

STAR_WORDS = """A plain CNN with BatchNorm, of four convolutions with 16 to 64 channels, on 1,000 images, and arms that
change one hyper-parameter each, three seeds; {tests} test images. Measures are those of 256 training images. The
networks are small and see few images, so their accuracy is far below what CIFAR-10 allows. The arms are chosen, not
drawn, so an interval says how much the numbers depend on single arms, and no more."""


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
- All networks on the digits have the same training images. Three seeds are three initialisations, and three choices of
  wrong labels. Intervals do not count that.
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
    lines = [
        headline(found, "The digits"),
        levels(found),
        held(found, "the digits"),
        worst(found),
        noisy(found["pairs"]),
    ]
    return "".join(f"- {line}\n" for line in lines if line)


def star_findings(found: dict[str, Rows], done: int, planned: int) -> str:
    """Return an item of a Markdown list that summarises the results on CIFAR-10, or an empty text without results.

    ``done`` is the number of networks that have been run, and ``planned`` the number of all networks of the star.
    """
    if not found.get("verdicts"):
        return ""
    so_far = f", so far {done} of {planned} networks" if done < planned else ""
    return f"- {headline(found, f'CIFAR-10{so_far}')}\n- {held(found, 'CIFAR-10')}\n"


def in_short(families: dict[str, dict[str, Rows]]) -> str:
    """Return a paragraph that says in words what relative flatness tells among networks of one noise level."""
    parts = []
    for data, found in families.items():
        if not found.get("verdicts"):
            continue
        said = []
        for target in MAIN_TARGETS:
            taus = rows_at(found["taus"], MAIN, target, SCOPES[1])
            best = best_of(taus, BASELINES)
            beside = {
                (row["measure"], row["reference"]): row for row in chosen(found["differences"], target, SCOPES[1])
            }
            verb = plainly(
                sign_of(taus[OURS], "tau", ("goes with", "goes the wrong way with", "does not clearly go with"))
            )
            than = plainly(
                sign_of(beside[OURS, best], "difference", ("clearly more", "clearly less", "not clearly more"))
            )
            compared = f", {than} than the best baseline ({LABELS[best]})" if verb == "goes with" else ""
            said.append(f"{verb} the {target}{compared}")
        parts.append(f"On {data} relative flatness {'; it '.join(said)}.")
    if not parts:
        return ""
    return f"**In short.** Networks with equally many wrong labels are compared at equal training loss. {' '.join(parts)}\n\n"


def plainly(answer: str) -> str:
    """Return an answer of :func:`sign_of` without its remark on single questions."""
    return answer.partition(" (")[0]


def told(row: dict[str, Any], key: str = "tau") -> str:
    return f"{number(row[key])} [{number(row['low'])}, {number(row['high'])}]"


def rows_at(rows: Rows, snapshot: str, target: str, scope: str) -> dict[str, dict[str, Any]]:
    """Return the rows of τ for one snapshot, target and scope, by the names of the numbers."""
    key = (snapshot, target, scope)
    return {row["measure"]: row for row in rows if (row["snapshot"], row["target"], row["scope"]) == key}


def best_of(taus: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """Return the name with the largest τ."""
    return max((name for name in names if name in taus), key=lambda name: taus[name]["tau"])


def headline(found: dict[str, Rows], data: str) -> str:
    """Return a paragraph on τ of relative flatness, of the best baseline and of settings, in both scopes."""
    parts = []
    for scope, words in (
        (SCOPES[1], "Among networks with equally many wrong labels"),
        (SCOPES[0], "Among all networks"),
    ):
        said = []
        for target in MAIN_TARGETS:
            taus = rows_at(found["taus"], MAIN, target, scope)
            best = best_of(taus, BASELINES)
            said.append(
                f"{told(taus[OURS])} with the {target} (best baseline: {number(taus[best]['tau'])}, {LABELS[best]})"
            )
        parts.append(f"{words}, relative flatness of the last convolution has τ {' and '.join(said)}")
    settings = []
    for key, words in (("tau_within", "among the former"), ("tau", "among all")):
        of = []
        for target in MAIN_TARGETS:
            known = [row for row in found["known"] if row["target"] == target and row[key] == row[key]]
            best_row = max(known, key=lambda row: abs(row[key]))
            of.append(f"{number(best_row[key])} with the {target} ({SETTINGS[best_row['setting']]})")
        settings.append(f"{words}, {' and '.join(of)}")
    return (
        f"**{data}, at equal training loss** ({MAIN}). {'. '.join(parts)}. The setting with the largest τ, of those that are "
        f"known before training, has: {'; '.join(settings)}."
    )


def levels(found: dict[str, Rows]) -> str:
    """Return a sentence on τ with the loss gap at every noise level, at the main snapshot and at the last epoch."""
    rows = [row for row in found["levels"] if row["target"] == "loss gap"]
    parts = []
    for snapshot in dict.fromkeys(row["snapshot"] for row in rows):
        mine = [row for row in rows if row["snapshot"] == snapshot]
        said = [
            f"{label} {', '.join(number(row['tau']) for row in mine if row['measure'] == name)}"
            for name, label in (
                (OURS, "relative flatness"),
                ("asam", LABELS["asam"]),
                ("weight_norm", "the weight norm"),
            )
        ]
        parts.append(f"At {snapshot}: {'; '.join(said)}")
    shares = ", ".join(f"{level:g}" for level in sorted({row["label_noise"] for row in rows}))
    return f"**By the share of wrong labels** ({shares}), τ with the loss gap. {'. '.join(parts)}."


def overview(families: dict[str, dict[str, Rows]]) -> str:
    """Return a table of τ of relative flatness beside the trace and the best baseline, for all data, at two snapshots."""
    cells = []
    for data, found in families.items():
        if not found.get("verdicts"):
            continue
        last = [row["snapshot"] for row in found["taus"]][-1]
        for snapshot, scope, target in product((MAIN, last), SCOPES[::-1], MAIN_TARGETS):
            taus = rows_at(found["taus"], snapshot, target, scope)
            beside = {
                (row["measure"], row["reference"]): row
                for row in (chosen(found["differences"], target, scope) if snapshot == MAIN else [])
            }
            best, first = best_of(taus, BASELINES), best_of(taus, PACKAGE)
            cells.append(
                (data, snapshot, scope, target, str(taus[OURS]["n"]), told(taus[OURS]), told(taus[TRACE]),
                 f"{told(taus[best])}, {LABELS[best]}", minus(beside[OURS, best]) if beside else "–",
                 f"{number(taus[first]['tau'])}, {LABELS[first]}", *against(beside, best))
            )  # fmt: skip
    headings = (
        "data", "snapshot", "networks", "target", "n", "relative flatness", "Hessian trace", "best baseline", "minus baseline",
        "best measure", "better", "worse",
    )  # fmt: skip
    text = (
        "τ with its 95 % interval. *Minus baseline*: relative flatness minus the best baseline; bold: clear after the "
        f"correction. *Better, worse*: how many of the {len(PACKAGE)} measures differ clearly from the best baseline, and in "
        "brackets without the correction.\n"
    )
    return text + "\n" + table(headings, cells, left=4)


def against(beside: dict[tuple[str, str], dict[str, Any]], best: str) -> tuple[str, str]:
    """Return how many measures are better than a baseline, and how many are worse, with and without the correction."""
    if not beside:
        return "–", "–"
    apart = [row for (_, reference), row in beside.items() if reference == best]
    better, worse = ([row for row in apart if row["difference"] * sign > 0] for sign in (1, -1))
    return counted(better), counted(worse)


def minus(row: dict[str, Any]) -> str:
    """Return a difference of two τ with its interval; it is bold if it is clear."""
    return interval(row, "difference")


def held(found: dict[str, Rows], data: str) -> str:
    """Return a paragraph on partial and granulated τ of relative flatness."""
    of, asam = ({row["target"]: row for row in found["details"] if row["measure"] == name} for name in (OURS, "asam"))
    parts = []
    for target in MAIN_TARGETS:
        row = of[target]
        parts.append(
            f"with the {target}: given the label noise {number(row['given_label_noise'])}, given the training loss "
            f"{number(row['given_train_loss'])}, given the weight norm {number(row['given_weight_norm'])}, given learning rate "
            f"over batch size {number(row['given_rate_over_batch'])}; granulated {number(row['granulated'])}, and "
            f"{number(row['granulated_within'])} without steps in label noise (ASAM sharpness: "
            f"{number(asam[target]['granulated_within'])})"
        )
    return f"**What is left of it on {data}.** τ of relative flatness {'. And '.join(parts)}."


SETTINGS = {
    "label_noise": "label noise",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "weight_decay": "weight decay",
    "train_size": "number of training images",
    "rate_over_batch": "learning rate over batch size",
}


def worst(found: dict[str, Rows]) -> str:
    """Return a paragraph on how many numbers are no better than a coin in their worst environment."""
    rows = [row for row in found["details"] if row["target"] == "loss gap"]
    ours = next(row for row in rows if row["measure"] == OURS)
    best = min((row for row in rows if row["measure"] in BASELINES), key=lambda row: row["sign_error"])
    return (
        f"**Which of two networks has the larger loss gap?** In their worst environment {coins(rows)}. Relative flatness "
        f"has a sign error of {number(ours['worst_sign_error'])} there ({ours['worst_where'].replace('_', ' ')}, "
        f"{ours['worst_pairs']} pairs), and {number(ours['sign_error'])} in the mean over {ours['environments']} environments. "
        f"The best baseline has {number(best['sign_error'])} in the mean ({LABELS[best['measure']]}). Always naming the same "
        f"value of the setting has {number(ours['constant_rule'])}, if the value is chosen by looking."
    )


def coins(rows: Rows) -> str:
    """Return how many numbers are no better than a coin in their worst environment, and how many are clearly better."""
    failing = sum(row["worst_sign_error"] >= 0.5 for row in rows)
    clearly = sum(row["worst_p"] * len(rows) < LEVEL for row in rows)
    return (
        f"{failing} of {len(rows)} numbers are no better than a coin. The other {len(rows) - failing} have fewer than half of "
        f"the pairs wrong there, {clearly or 'none'} of them clearly (binomial test, corrected for {len(rows)} numbers, as if "
        "pairs were independent)"
    )


def noisy(rows: Rows) -> str:
    """Return a sentence on how often label noise raises relative flatness and the trace."""
    of = {row["number"]: row for row in rows}
    if not of:
        return ""
    ours, trace, norm = of[OURS], of[TRACE], of["weight_norm"]
    return (
        f"**Label noise** raises relative flatness in {ours['larger']} of {ours['pairs']} matched pairs, the Hessian trace in "
        f"{trace['larger']}, and the norm of the weights, a baseline, in {norm['larger']}, at equal training loss."
    )


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
