"""Show results in the terminal, and write docs/benchmarks.md and docs/benchmarks-runs.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.live_profile import Part, lines
from benchmarks.rows import Row

Results = dict[str, dict[str, Any]]  # what benchmarks/results has, by family
PEERS = ("traces", "classifier", "all_layers", "classes")
RUNS = "benchmarks-runs.txt"

HEAD = f"""# Benchmarks

You want to know what measuring costs, for a run like yours and beside other packages. `make bench` measures the ratios
and writes this page. [All runs]({RUNS}) has every single time and how each row was measured. Figures of one GPU are
in [On a GPU](gpu.md).

**In a row** both sides have the same batch, threads and precision, and take turns in one run. The ratio is that of
their medians. A goal that is missed is in bold, and [the end of the page](#why-goals-are-missed) says why.
"""

SETUPS = """## What it adds to a run

How long an epoch takes with `FlatnessCallback()`, divided by the time without it: 1.1 is a tenth longer. A training
epoch ends with a validation of a fifth as many images. With `data="train"` a twelfth of the training images are
measured. Memory is the peak of a validation. Behind a ratio is the goal.
"""

BESIDE = """## Beside other packages

Peers are run as their documentation says, in the newest release that installs. There is a ratio only if they give the
same number: to 1e-3 if they are exact, within four standard errors if they estimate. *Faster* means that the other
takes so many times as long.
"""

GROWTH = """## How cost grows

The exponent of time and memory: 1 means that twice as much takes twice as long. It is the slope of a straight line
through the logarithms of the points.
"""

PROFILE = """## Where the time goes

A batch of {samples} images of a {name}, 32x32, whose forward pass is observed as in validation. *Limit*: the
operations (*GFLOP*) at {gflops:.0f} GFLOP/s, or the bytes that must be read and written at least once (*MB*) at
{gbytes:.0f} GB/s, whichever takes longer; both speeds were measured in the same run (a matrix product of 2048x2048, a
copy of 256 MB). A cell is empty where a part is mostly Python and small tensors.

"""

HOW = """## How it was measured

- Freed memory stays with the process (`MALLOC_MMAP_THRESHOLD_=33554432`, `MALLOC_TRIM_THRESHOLD_=4294967296`). By
  default glibc returns much of it after every layer and requests it again. How often depends on the layout of the heap,
  which any change of the program moves: epochs of the same task then differ by 15 %.
- Peak memory is that of resident memory, above what was resident before, in a process of its own that returns freed
  memory at once (both variables at 131072).
"""


def shown(row: Row) -> tuple[str, ...]:
    """Return the cells of a row beside other packages; an extrapolated ratio says so, a missing one has the reason."""
    what, against, ratio, goal, met, note = row.cells()
    against += ", extrapolated" if row.extrapolated else ""
    return what, against, ratio or note, goal, met


def show(found: dict[str, Any]) -> None:
    """Print the rows or the profiles of one family."""
    console = Console(width=None if Console().is_terminal else 160)
    headings = ("what", "against", "ratio", "goal", "met", "how")
    table = Table(*(Column(heading, overflow="fold") for heading in headings), show_lines=True)
    for row in rows_of(found):
        table.add_row(*(cell.replace("**", "") for cell in row.cells()))
    if table.row_count:
        console.print(table)
    for name, profile in found.get("profiles", {}).items():
        console.print(name, *profile_lines(profile), sep="\n", markup=False, soft_wrap=True)


def rows_of(found: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in found.get("rows", ())]


def profile_lines(profile: dict[str, Any]) -> list[str]:
    return lines([Part(**part) for part in profile["parts"]], profile["limits"])


def write(results: Results, folder: Path) -> list[Path]:
    """Write the page and the file with all runs to a folder; return their paths."""
    texts = {"benchmarks.md": text(results), RUNS: runs(results)}
    for name, content in texts.items():
        (folder / name).write_text(content)
    return [folder / name for name in texts]


def text(results: Results) -> str:
    """Return the page in Markdown."""
    rows = {name: rows_of(found) for name, found in results.items()}
    parts = [HEAD]
    if rows.get("setups"):
        measured = results["setups"]["machine"].get("measured", "at an unknown time")
        parts.append(f"{SETUPS}\n{pivoted(rows['setups'], 'set-up')}\nMeasured {measured}.\n")
    peers = [shown(row) for name in PEERS for row in rows.get(name, ())]
    if peers:
        parts.append(BESIDE + "\n" + markdown(("what", "against", "ratio", "goal", "met"), peers))
    if rows.get("growth"):
        parts.append(GROWTH + "\n" + pivoted(rows["growth"], "what grows"))
    for number, (name, profile) in enumerate(results.get("live_profile", {}).get("profiles", {}).items()):
        speeds = {"gflops": profile["limits"]["flops"] / 1e9, "gbytes": profile["limits"]["bytes"] / 1e9}
        head = PROFILE.format(samples=64, name=name, **speeds) if not number else f"The same of a {name}:\n\n"
        parts.append(head + "\n".join(profile_lines(profile)) + "\n")
    why = Path(__file__).with_name("why.md").read_text()  # written by hand
    return "\n".join([*parts, why, HOW, machines(results)])


def pivoted(rows: list[Row], heading: str) -> str:
    """Return a table with one line for each ``what`` before the last colon, and a column for each word behind it.

    Reasons of rows without a ratio are listed below the table, and so is each ``what`` of which nothing was measured.
    """
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        what, _, column = row.what.rpartition(": ")
        table.setdefault(what, {})[column] = row
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    reasons = list(dict.fromkeys(row.note for row in rows if row.ratio is None))
    marks = {why: f"({number})" for number, why in enumerate(reasons, 1)}

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        _, _, ratio, goal, _, note = row.cells()
        ratio = f"**{ratio}**" if row.met is False else ratio or marks[note]
        return f"{ratio} ({goal})" if goal and row.ratio is not None else ratio

    missing = {what for what, cells in table.items() if all(row.ratio is None for row in cells.values())}
    lines = [(what, *(cell(cells.get(c)) for c in columns)) for what, cells in table.items() if what not in missing]
    notes = []
    for why, mark in marks.items():
        same = [
            what for what, cells in table.items() if what in missing and why in {row.note for row in cells.values()}
        ]
        notes.append(f"{mark} {why}" + (f"; nothing of: {'; '.join(same)}" if same else ""))
    return markdown((heading, *columns), lines) + (f"\n{chr(10).join(notes)}\n" if notes else "")


def markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def machines(results: Results) -> str:
    """Return a section that describes the machine of every family; equal descriptions are given once."""
    by_machine: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, found in results.items():
        about = tuple((key, value) for key, value in found["machine"].items() if key != "load before")
        by_machine.setdefault(about, []).append(name.replace("_", " "))
    tables = [
        f"Of {', '.join(names)}:\n\n" + markdown(("machine", ""), [tuple(pair) for pair in about])
        for about, names in by_machine.items()
    ]
    return "## Machines\n\n" + "\n".join(tables)


def runs(results: Results) -> str:
    """Return the text with every row, how it was measured, and all its times."""
    parts = [
        "Every row of benchmarks.md: what, against, ratio; how it was measured; all times, in seconds if not in MB."
    ]
    for name, found in results.items():
        parts.append(f"\n== {name}; load before: {found['machine'].get('load before', 'not known')}")
        for row in rows_of(found):
            what, against, ratio, _, _, note = row.cells()
            parts.append(f"\n{what}; against: {against}; {ratio or 'no ratio'}\n  {note}")
            parts += [f"  {kind}: " + " ".join(f"{value:.4g}" for value in values) for kind, values in row.raw.items()]
    return "\n".join(parts) + "\n"
