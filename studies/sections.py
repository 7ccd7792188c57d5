"""Write the sections of the page about one family of networks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from studies import figures
from studies.analysis import MAIN, MAIN_TARGETS, SCOPES, analyse, sample
from studies.families import Family
from studies.findings import SETTINGS, coins
from studies.markdown import interval, number, percent, picture, table
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.tables import write_rows
from studies.verdicts import COMPARED, OURS, best_of, by_pair, chosen, verdicts

Rows = list[dict[str, Any]]


def family_section(results: Path, images: Path, family: Family, title: str, words: str) -> tuple[str, dict[str, Rows]]:
    """Analyse a family and draw its figures; return its part of the page, and the tables of the analysis."""
    found = analyse(results, family)
    if not found["taus"]:
        return f"## {title}\n\n{words}\n\nNot run yet.\n", found
    found["verdicts"] = verdicts(found)
    write_rows(results / f"{family.name}-verdicts.csv", found["verdicts"])
    parts = [f"## {title}\n", words + "\n", reached(found["reached"]), reliability(found["reliability"])]
    name = family.name
    figures.save(figures.heat(found["taus"], title), images / f"{name}-all.png")
    if chosen(found["taus"], MAIN_TARGETS[0], SCOPES[0]):
        figures.save(figures.intervals(found["taus"], title), images / f"{name}-tau.png")
        figures.save(figures.scatter(sample(results, family, MAIN), title), images / f"{name}-scatter.png")
        parts += [
            answers(found),
            picture(f"{name}-tau", f"{title}: τ of every measure with its interval"),
            wobble(results, family, found),
        ]
        parts += [picture(f"{name}-scatter", f"{title}: loss gap and test error against four numbers")]
    parts += [picture(f"{name}-all", f"{title}: τ of all measures with all targets at all snapshots")]
    parts += [main_table(found, target) for target in MAIN_TARGETS if found["details"]]
    parts += [known_table(found)] if found["known"] else []
    parts += [level_table(found["levels"])] if found["levels"] else []
    parts += [difference_table(found)] if found["differences"] else []
    parts += [pairs_table(found["pairs"])] if found["pairs"] else []
    return "\n".join(parts), found


def reached(rows: Rows) -> str:
    """Return the section with the number of networks at each snapshot."""
    headings = (
        "snapshot", "networks", "of", "never there", "left out", "configurations", "training loss", "test error",
    )  # fmt: skip
    cells = [
        (row["snapshot"], str(row["n"]), str(row["of"]), str(row["never"]), str(row["left_out"]),
         str(row["configurations"]),
         f"{row['train_loss_low']:.2g} to {row['train_loss_high']:.2g}",
         f"{percent(row['test_error_low'])} to {percent(row['test_error_high'])}")
        for row in rows
    ]  # fmt: skip
    text = (
        "A snapshot at a loss is the first one, of those looked at, whose training loss (all training images, "
        "evaluation mode) is not above it. *Never there*: the loss was not reached, as happens to networks that are small "
        "or strongly regularised. *Left out*: the loss had jumped below half of it, or a number is missing.\n"
    )
    return "### How many networks\n\n" + text + "\n" + table(headings, cells)


def reliability(rows: Rows) -> str:
    """Return the section that says how reliable the targets are, by comparing two halves of the test images."""
    text = (
        "Before any measure: how well does one half of the test images tell what the other half says of the same "
        "networks? *τ of halves* is between both halves. *Reliability* is Pearson's r, stepped up to all test images. "
        "No measure can be expected to have a larger r with a target than the square root of its reliability. Where it is "
        "low, a τ near zero says nothing. The noise of seeds is not in it.\n"
    )
    headings = ("snapshot", "target", "networks", "n", "τ of halves", "reliability")
    cells = [
        (row["snapshot"], row["target"], row["scope"], str(row["n"]), number(row["tau"]), number(row["whole"]))
        for row in rows
    ]
    return "### How reliable the targets are\n\n" + text + "\n" + table(headings, cells, left=3)


def answers(found: dict[str, Rows]) -> str:
    """Return the section with the verdicts, with a column for each target and scope."""
    columns = [(target, scope) for target in MAIN_TARGETS for scope in SCOPES]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for row in found["verdicts"]:
        rows.setdefault(row["question"], {})[row["target"], row["scope"]] = row["answer"]
    headings = ("question", *(f"{target}, {scope}" for target, scope in columns))
    cells = [(question, *(row.get(column, "–") for column in columns)) for question, row in rows.items()]
    tried = sum(row["p"] == row["p"] for row in found["taus"])
    compared = sum(row["p"] == row["p"] for row in found["differences"])
    text = (
        f"{tried} values of τ were looked at (measures and baselines × snapshots × targets × scopes) and {compared} "
        "differences between them. A verdict other than *not clear* takes p < 0.05 after the correction for the number "
        "(Holm), with errors from leaving out one configuration at a time. The best baseline is the one with the "
        "largest τ, found by looking. "
        f"Verdicts are those at {MAIN}.\n"
    )
    return "### Verdicts\n\n" + text + "\n" + table(headings, cells, left=5)


def wobble(results: Path, family: Family, found: dict[str, Rows]) -> str:
    """Return a sentence on how much the intervals change with another seed of the bootstrap."""
    other = analyse(results, family, seed=1, is_written=False)
    sides = sum(
        (a["low"] > 0) != (b["low"] > 0) or (a["high"] < 0) != (b["high"] < 0)
        for a, b in zip(found["taus"], other["taus"], strict=True)
    )
    ends = max(
        (
            abs(a[end] - b[end])
            for a, b in zip(found["taus"], other["taus"], strict=True)
            for end in ("low", "high")
            if a[end] == a[end]
        ),
        default=0.0,
    )
    return (
        f"{sides} of {len(found['taus'])} intervals include zero with one seed of the bootstrap and not with another, and no "
        f"end of an interval moves by more than {ends:.2f}. Verdicts use no random numbers.\n"
    )


def main_table(found: dict[str, Rows], target: str) -> str:
    """Return the section with all baselines and measures for one target."""
    whole, within = ({r["measure"]: r for r in chosen(found["taus"], target, scope)} for scope in SCOPES)
    of = {row["measure"]: row for row in found["details"] if row["target"] == target}
    has_environments = bool(next(iter(of.values()))["environments"])
    headings = (
        "number", "τ [95 %]", "within noise levels", "given label noise", "given train loss", "given weight norm",
        "given lr/batch", "granulated", "without noise steps",
        *(("sign error", "worst", "where") if has_environments else ()), "r", "r of log",
    )  # fmt: skip
    cells = []
    for name in (name for name in LABELS if name in of):
        row = of[name]
        kept = ("label_noise", "train_loss", "weight_norm", "rate_over_batch")
        held = [number(row[f"given_{key}"]) for key in kept]
        grains = [number(row["granulated"]), number(row["granulated_within"])]
        star = "\\*" if name in BASELINES else ""
        taus = [interval(rows[name], "tau") for rows in (whole, within)]
        errors = [number(row["sign_error"]), number(row["worst_sign_error"]), row["worst_where"].replace("_", " ")]
        others = [number(row[key]) for key in ("pearson", "pearson_log")]
        cells.append((LABELS[name] + star, *taus, *held, *grains, *(errors if has_environments else ()), *others))
    first = next(iter(of.values()))
    environments = (
        "*Sign error* (Dziugaite et al. 2020): share of matched pairs put in the wrong order, in the mean over "
        f"{first['environments']} environments and in the *worst* one; 0.5 is a coin. Only pairs whose outcomes clearly "
        f"differ count ({first['environment_pairs']} of {first['all_pairs']}). In their worst environment "
        f"{coins(list(of.values()))}. "
        if has_environments
        else "No environment has enough matched pairs for sign errors. "
    )
    text = (
        f"{first['n']} networks; \\*: baseline; bold: clear after the correction. *Given*: partial τ. *Granulated*: "
        "among networks that differ in one hyper-parameter alone (Jiang et al. 2020); *without noise steps*: and not in "
        f"label noise. {environments}*r*: Pearson's, as in Petzka et al. 2021, over all noise levels together.\n"
    )
    return f"### All numbers, {target}\n\n{text}\n" + table(headings, cells)


def known_table(found: dict[str, Rows]) -> str:
    """Return the section that compares relative flatness with settings that are known before training."""
    cells = []
    for target in MAIN_TARGETS:
        whole, within = ({r["measure"]: r for r in chosen(found["taus"], target, scope)} for scope in SCOPES)
        cells.append((target, LABELS[OURS], number(whole[OURS]["tau"]), number(within[OURS]["tau"])))
        cells += [
            (target, SETTINGS[row["setting"]], number(row["tau"]), number(row["tau_within"]))
            for row in found["known"]
            if row["target"] == target
        ]
    text = (
        f"τ at {MAIN} of settings that one knows without any measurement. Their signs are as they come: no sign was "
        "expected.\n"
    )
    headings = ("target", "number", "τ", "within noise levels")
    return "### Known before training\n\n" + text + "\n" + table(headings, cells, left=2)


def level_table(rows: Rows) -> str:
    """Return the section with τ among networks of one noise level, for our main measures and some baselines."""
    levels = sorted({row["label_noise"] for row in rows})
    at = {(row["snapshot"], row["target"], row["measure"], row["label_noise"]): row for row in rows}
    keys = list(dict.fromkeys((row["snapshot"], row["target"]) for row in rows))
    cells = []
    for key, name in product(keys, (*COMPARED, "asam", "weight_norm", "feature_spread")):
        found = [at.get((*key, name, level)) for level in levels]
        label = LABELS[name] + ("\\*" if name in BASELINES else "")
        if any(found):
            cells.append((*key, label, *(number(row["tau"] if row else None) for row in found)))
    first = {row["label_noise"]: row["n"] for row in rows if row["snapshot"] == keys[0][0]}
    counts = ", ".join(f"{count} with {level:g}" for level, count in first.items())
    text = (
        "τ among networks with the same share of wrong labels, for shares with ten networks or more (at "
        f"{keys[0][0]}: {counts}).\n"
    )
    headings = ("snapshot", "target", "number", *(f"noise {level:g}" for level in levels))
    return "### By noise level\n\n" + text + "\n" + table(headings, cells, left=3)


def difference_table(found: dict[str, Rows]) -> str:
    """Return the section with differences in τ between measures and baselines.

    The measures are those in ``COMPARED`` and the measure of the package with the largest τ.
    """
    parts = ["### Against the baselines\n"]
    parts.append(
        "The difference of two τ on the same networks, with its interval: above zero the measure is better. The fourth "
        "measure is the one of the package with the largest τ, chosen after looking, so it looks better than it is.\n"
    )
    for target, scope in ((MAIN_TARGETS[0], SCOPES[0]), (MAIN_TARGETS[0], SCOPES[1]), (MAIN_TARGETS[1], SCOPES[1])):
        taus = {row["measure"]: row for row in chosen(found["taus"], target, scope)}
        at = by_pair(chosen(found["differences"], target, scope))
        best = best_of(taus, PACKAGE)
        names = list(dict.fromkeys([*COMPARED, best]))
        references = list(dict.fromkeys(reference for _, reference in at))
        cells = [
            (LABELS[ref], *(interval(at[name, ref], "difference") if (name, ref) in at else "–" for name in names))
            for ref in references
        ]
        headings = (f"{target}, {scope}: τ minus that of", *(LABELS[name] for name in names))
        parts.append(table(headings, cells))
    return "\n".join(parts)


def pairs_table(rows: Rows) -> str:
    """Return the section that counts how often label noise raises each number."""
    first = rows[0]
    text = (
        f"Pairs of networks that differ in label noise alone ({first['environment'].replace('_', ' ')}; "
        f"{first['pairs']} pairs, both at {MAIN}): in how many the number is larger with the noise. Margins and C_t "
        "count with a minus sign.\n"
    )
    cells = [(LABELS.get(row["number"], row["number"]), str(row["larger"]), str(row["pairs"])) for row in rows]
    half = (len(cells) + 1) // 2
    cells += [("", "", "")] * (2 * half - len(cells))
    both = [(*a, *b) for a, b in zip(cells[:half], cells[half:], strict=True)]
    return "### Label noise\n\n" + text + "\n" + table(("number", "larger", "of", "number", "larger", "of"), both)
