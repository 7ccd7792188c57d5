"""Make the tables of a comparison, and the HTML that notebooks show for a comparison."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lightning_flatness.results.rank_correlation import BASELINES, BEST, MEASURES, correlation_table
from lightning_flatness.results.texts import as_html, measured, named, number_of, samples_of

if TYPE_CHECKING:
    from lightning_flatness.results.comparison import Comparison


def decision_table(comparison: Comparison, has_caption: bool = True) -> Table:
    """Return the main table of a comparison, with a row for every model.

    A row has the normalised relative flatness, its ratio to the first model's value, the losses, the accuracy, the
    outcome, and whether the numbers are exact. The caption has the verdict, the cautions and how to read the numbers;
    with ``has_caption=False`` there is no caption.
    """
    rows = comparison.models
    caption = _caption(comparison) if has_caption else None
    table = Table(title=Text(title(comparison)), caption=caption, caption_justify="left", caption_style="")
    table.add_column("model", overflow="fold")
    same_loss = all(row.loss == row.train_loss or math.isnan(row.loss) for row in rows.values())
    numbers = [
        *["train_loss"] * any(not math.isnan(row.train_loss) for row in rows.values()),
        *["loss"] * (not same_loss),
        "accuracy",
    ]
    headings = MEASURES | BASELINES
    outcome = [comparison.outcome_name] * bool(comparison.outcome_name)
    if all(row.data == "val" for row in rows.values()):
        headings |= {"loss": "val loss"}  # because the table may also have a column with the training loss
    for heading in (headings[BEST], f"times {comparison.reference}", *(headings.get(n, n) for n in numbers), *outcome):
        table.add_column(Text(heading), justify="right")
    table.add_column("exact")
    for name, row in rows.items():
        ratio = comparison.difference(BEST, name)
        shown = "1" if name == comparison.reference else measured(ratio.ratio, ratio.ratio_error)
        cells = [with_mark(comparison, BEST, name), shown, *(row.shown(number) for number in numbers)]
        table.add_row(Text(name), *cells, *[measured(row.outcome)] * len(outcome), "yes" if row.exact else "no")
    return table


def _caption(comparison: Comparison) -> Text:
    """Return the caption of the main table: the verdict, the cautions, and how to read the numbers."""
    caption = Text(comparison.verdict, style="bold")
    for caution in comparison.cautions:
        caption.append("\nCAUTION: ", style="bold red").append(caution.sentence, style="not bold")
    return caption.append("\n" + reading(comparison), style="not bold dim")


def measures_table(comparison: Comparison) -> Table:
    """Return a table of the known measures and baselines, except those of the main table."""
    rows = comparison.models
    known = [
        number
        for number in (*MEASURES, *BASELINES)
        if number not in (BEST, "train_loss") and any(not math.isnan(getattr(row, number)) for row in rows.values())
    ]
    table = Table(title="Other measures of flatness, and numbers that need no Hessian")
    table.add_column("model", overflow="fold")
    for number in known:
        table.add_column((MEASURES | BASELINES)[number], justify="right")
    for name in rows:
        table.add_row(Text(name), *(with_mark(comparison, number, name) for number in known))
    return table


def with_mark(comparison: Comparison, number: str, name: str) -> str:
    """Return a model's number as text, with a mark if it does not differ clearly from the first model's number.

    The mark is ``≈`` if the difference is at most two standard errors, and ``?`` if its standard error is not known.
    """
    text = comparison.models[name].shown(number)
    if name == comparison.reference or text == "-" or number not in MEASURES:
        return text
    found = comparison.difference(number, name)
    return text if found.is_clear else f"{text} ≈" if found.is_known else f"{text} ?"


def title(comparison: Comparison) -> str:
    """Return the title of a comparison: the number of models, the layers and the samples."""
    rows = comparison.models.values()
    layers = " / ".join(dict.fromkeys(named(row.layers) for row in rows))
    samples = " / ".join(dict.fromkeys(samples_of(row.num_samples, row.data) for row in rows))
    return f"Flatness of {layers} in {number_of(len(rows), 'model')}, over {samples}"


def reading(comparison: Comparison) -> str:
    """Return sentences that explain the numbers, errors and marks of the tables."""
    first = comparison.reference
    pairs = (
        "Errors of differences take into account that all models were measured on the same samples."
        if comparison.is_paired
        else "Errors of differences assume different samples; if the samples are the same, most errors are smaller."
    )
    marks = {with_mark(comparison, number, name)[-1] for number in MEASURES for name in comparison.models}
    return (
        "Lower is flatter. Normalised: relative flatness with every channel that the layer reads scaled to "
        f"standard deviation one; networks are compared by it. times {first}: divided by the value of {first}. ±: one "
        f"standard error over samples. {pairs}"
        + f" ≈: no clear difference from {first}, at most two standard errors." * ("≈" in marks)
        + " ?: error not known." * ("?" in marks)
        + " Exact: the numbers are those of the full Hessian on these samples." * comparison.exact
    )


def as_page(comparison: Comparison) -> str:
    """Return the comparison as HTML that needs no style sheet: the verdict, the cautions and the tables."""
    style = "border-left: 0.3em solid currentColor; padding: 0.1em 0.8em; margin: 0.3em 0; max-width: 60em"
    cautions = "".join(
        f'<p style="{style}"><strong>Caution.</strong> {escape(caution.sentence)}</p>'
        for caution in comparison.cautions
    )
    parts = [
        f"<p><strong>{escape(comparison.verdict)}</strong></p>{cautions}",
        as_html(decision_table(comparison, has_caption=False)),
        f'<p style="max-width: 60em; opacity: 0.8">{escape(reading(comparison))}</p>',
        as_html(measures_table(comparison)),
    ]
    if comparison.correlations:
        parts.append(as_html(correlation_table(comparison.correlations, comparison.outcome_name)))
    return f"<div>{'<br>'.join(parts)}</div>"
