"""Answer the questions of the study from p-values, in the same words for every family.

The p-values do not depend on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from studies.analysis import MAIN, MAIN_TARGETS, SCOPES, is_clear
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.statistics import LEVEL

Rows = list[dict[str, Any]]
OURS = "relative_flatness.last"
NORMALISED = "normalized_relative_flatness.last"
TRACE = "hessian_trace.last"


COMPARED = (OURS, NORMALISED, TRACE)


def by_pair(differences: Rows) -> dict[tuple[str, str], dict[str, Any]]:
    """Return rows of differences by their measure and the number that it is compared with."""
    return {(row["measure"], row["reference"]): row for row in differences}


def best_of(taus: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """Return the name with the largest τ."""
    return max((name for name in names if name in taus), key=lambda name: taus[name]["tau"])


def chosen(rows: Rows, target: str, scope: str) -> Rows:
    """Return the rows for one target and scope at the main snapshot ``MAIN``."""
    return [row for row in rows if (row["snapshot"], row["target"], row["scope"]) == (MAIN, target, scope)]


def verdicts(found: dict[str, Rows]) -> list[dict[str, str]]:
    """Return the questions with their answers, for every main target and scope."""
    rows = []
    for target in MAIN_TARGETS:
        for scope in SCOPES:
            taus, differences = chosen(found["taus"], target, scope), chosen(found["differences"], target, scope)
            if taus:
                answers = answers_of({row["measure"]: row for row in taus}, differences)
                rows += [{"target": target, "scope": scope, "question": q, "answer": a} for q, a in answers.items()]
    return rows


def answers_of(taus: dict[str, dict[str, Any]], differences: Rows) -> dict[str, str]:
    """Return a mapping from questions to answers, for one target and scope.

    ``taus`` maps each measure to its row of τ, and ``differences`` are the rows of differences in τ.
    """
    beside = by_pair(differences)
    answers = {}
    for name in COMPARED:
        answers[f"Does {LABELS[name]}, go with it?"] = sign_of(
            taus[name], "tau", ("yes", "yes, the wrong way", "not clear")
        )
    words = "better", "worse", "not clear"
    for name, reference in ((OURS, TRACE), (NORMALISED, TRACE), (OURS, "weight_norm"), (OURS, "feature_spread")):
        question = f"Is {LABELS[name]}, better than {LABELS[reference]}?"
        answers[question] = sign_of(beside[name, reference], "difference", words)
    best = best_of(taus, BASELINES)
    better = [name for name in PACKAGE if name in taus and beats(beside, name, best)]
    worse = [name for name in PACKAGE if name in taus and beats(beside, name, best, -1)]
    count = sum(name in PACKAGE for name in taus)
    label = f"the best baseline ({LABELS[best]})"
    answers[f"Which of {count} measures are better than the best baseline?"] = listed(better) + f"; than {label}"
    answers[f"Which of {count} measures are worse than the best baseline?"] = listed(worse)
    for kind, of in KINDS.items():
        rows = [taus[name] for name in taus if name in of]
        question = f"How many of {len(rows)} {kind} go with it, and how many the wrong way? (Without the correction)"
        answers[question] = "; ".join(counted([row for row in rows if row["tau"] * sign > 0]) for sign in (1, -1))
    return answers


KINDS = {"measures": PACKAGE, "baselines": BASELINES}


def sign_of(row: dict[str, Any], key: str, words: tuple[str, str, str]) -> str:
    """Return the first of ``words`` if a number is clearly positive, the second if clearly negative, else the third.

    If the number is not clear only because of the correction for multiple tests, the answer says so.
    """
    word = words[0] if row[key] > 0 else words[1]
    if is_clear(row):
        return word
    return f"{words[2]} ({word}, were it the only question)" if row["p"] < LEVEL else words[2]


def beats(beside: dict[tuple[str, str], dict[str, Any]], name: str, reference: str, sign: int = 1) -> bool:
    """Return whether a measure's τ is clearly larger than a reference's; with ``sign=-1``, clearly smaller."""
    row = beside.get((name, reference))
    return row is not None and is_clear(row) and row["difference"] * sign > 0


def counted(rows: Rows) -> str:
    """Return how many rows are clear, and in brackets how many would be without the correction."""
    return f"{sum(map(is_clear, rows))} ({sum(row['p'] < LEVEL for row in rows)})"


def listed(names: list[str]) -> str:
    return "; ".join(LABELS[name] for name in names) or "none"
