"""Measure what flatness costs, print tables and write docs/benchmarks.md.

    python -m benchmarks [--rows FAMILY ...] [--quick] [--page]

A family is a group of rows. Every family runs in a separate process. If a process fails, or the system kills it because
it uses too much memory, its rows have the reason, and the other families are not affected. The results of a family are
kept in benchmarks/results with a description of the machine, and the page is written from all that are there: a family
that is not run keeps its results. ``--quick`` prints its results only. ``--page`` measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks import machine, page
from benchmarks.rows import Row
from benchmarks.timing import KEEPS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FAMILIES = ("setups", "classes", "traces", "classifier", "all_layers", "growth", "live_profile")
PROFILES = {"ResNet-18": "resnet18", "ResNet-20": "resnet20"}
LIMIT = 3600  # largest time for a family, in seconds


def family(name: str, quick: bool) -> dict[str, Any]:
    """Measure one family in this process; return the machine, and the rows or the profiles."""
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {"machine": machine.described()}
    if name == "live_profile":
        from benchmarks import live_profile

        limits = machine.limits()
        found["profiles"] = {
            title: {"limits": limits, "parts": [p.as_dict() for p in live_profile.measure("cpu", quick, network)]}
            for title, network in PROFILES.items()
        }
    else:
        found["rows"] = [row.as_dict() for row in importlib.import_module(f"benchmarks.{name}").measure(quick)]
    return found


def measured(name: str, quick: bool) -> dict[str, Any]:
    """Measure a family in a separate process; if the process fails, every row has the reason."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks", "--family", name, str(store), *["--quick"] * quick]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | KEEPS, stderr=subprocess.PIPE, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return failed(name, f"took more than {LIMIT} s")
        if store.exists():
            return json.loads(store.read_text())
    error = (done.stderr.strip().splitlines() or [""])[-1]
    return failed(name, error or f"the process ended with exit code {done.returncode}")


def failed(name: str, why: str) -> dict[str, Any]:
    """Return the results of a family that could not be measured."""
    rows: list[Row] = [] if name == "live_profile" else importlib.import_module(f"benchmarks.{name}").rows()
    return {"machine": machine.described(), "rows": [row.failed(why).as_dict() for row in rows], "failed": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=FAMILIES, default=FAMILIES, help="only these families")
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes, to see that all runs")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page")
    parser.add_argument("--family", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        name, store = options.family
        Path(store).write_text(json.dumps(family(name, options.quick)))
        return

    RESULTS.mkdir(exist_ok=True)
    for name in () if options.page else options.rows:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = measured(name, options.quick)
        page.show(found)
        if not options.quick:
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if not options.quick:
        written = page.write(results(RESULTS), ROOT / "docs")
        print(*(f"Written: {path.relative_to(ROOT)}" for path in written), sep="\n")


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of all families in a folder by name."""
    return {name: json.loads(path.read_text()) for name in FAMILIES if (path := folder / f"{name}.json").exists()}


if __name__ == "__main__":
    main()
