"""Summarise the results at the top of the page, in sentences and a table that follow from the numbers."""

from __future__ import annotations

from itertools import product
from typing import Any

from studies.analysis import MAIN, MAIN_TARGETS, SCOPES
from studies.markdown import interval, number, table
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.statistics import LEVEL
from studies.verdicts import OURS, TRACE, best_of, by_pair, chosen, counted, sign_of

Rows = list[dict[str, Any]]


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
    for data, found in analysed(families):
        said = []
        for target in MAIN_TARGETS:
            taus = rows_at(found["taus"], MAIN, target, SCOPES[1])
            best = best_of(taus, BASELINES)
            beside = by_pair(chosen(found["differences"], target, SCOPES[1]))
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


def analysed(families: dict[str, dict[str, Rows]]) -> list[tuple[str, dict[str, Rows]]]:
    """Return the names and tables of the families that have results."""
    return [(data, found) for data, found in families.items() if found.get("verdicts")]


def plainly(answer: str) -> str:
    """Return an answer of :func:`sign_of` without its remark on single questions."""
    return answer.partition(" (")[0]


def told(row: dict[str, Any], key: str = "tau") -> str:
    return f"{number(row[key])} [{number(row['low'])}, {number(row['high'])}]"


def rows_at(rows: Rows, snapshot: str, target: str, scope: str) -> dict[str, dict[str, Any]]:
    """Return the rows of τ for one snapshot, target and scope, by the names of the numbers."""
    key = (snapshot, target, scope)
    return {row["measure"]: row for row in rows if (row["snapshot"], row["target"], row["scope"]) == key}


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
    """Return a table of τ of relative flatness, the trace and the best baseline, at two snapshots of each family."""
    cells = []
    for data, found in analysed(families):
        last = [row["snapshot"] for row in found["taus"]][-1]
        for snapshot, scope, target in product((MAIN, last), SCOPES[::-1], MAIN_TARGETS):
            taus = rows_at(found["taus"], snapshot, target, scope)
            beside = by_pair(chosen(found["differences"], target, scope) if snapshot == MAIN else [])
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
