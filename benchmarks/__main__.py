"""Measure what flatness costs, print a table and write docs/benchmarks.md.

    python -m benchmarks [--rows FAMILY ...] [--quick] [--missing]

A family is a group of rows of the table. Every family runs in a separate process. If a process fails, or the system
kills it because it uses too much memory, the table shows the reason, and the other families are not affected. Results
are kept in build/benchmarks; --missing continues an interrupted run. The page is written after all families were
measured; with --rows or --quick only the table is printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, page
from benchmarks.rows import Row
from benchmarks.timing import KEEPS

ROOT = Path(__file__).parents[1]
PAGE, STORE = ROOT / "docs" / "benchmarks.md", ROOT / "build" / "benchmarks"
FAMILIES = ("callback", "classes", "traces", "classifier", "all_layers", "growth")
PROFILES = {"ResNet-18": "resnet18", "ResNet-20": "resnet20"}
LIMIT = 900  # largest time for a family, in seconds


def family(name: str, device: str, quick: bool, store: Path) -> None:
    """Measure one family in this process, and write the result to the file ``store``."""
    warnings.filterwarnings("ignore")
    if name == "live_profile":
        from benchmarks import live_profile

        limits = machine.limits(device)
        result: Any = {
            title: {"limits": limits, "parts": [p.as_dict() for p in live_profile.measure(device, quick, network)]}
            for title, network in PROFILES.items()
        }
    else:
        rows = importlib.import_module(f"benchmarks.{name}").measure(device, quick)
        result = [row.as_dict() for row in rows]
    store.write_text(json.dumps(result, indent=1))


def measured(name: str, device: str, quick: bool, missing: bool) -> Any:
    """Measure a family in a separate process; return its parsed JSON, or a string with the reason of a failure."""
    store = STORE / f"{name}-{device}{'-quick' if quick else ''}.json"
    if missing and store.exists():
        return json.loads(store.read_text())
    store.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--family", name, device, str(store), *["--quick"] * quick]
    try:
        environment = os.environ | KEEPS
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    if store.exists():
        return json.loads(store.read_text())
    error = (done.stderr.strip().splitlines() or [""])[-1]
    return error or f"the process ended with exit code {done.returncode}"


def rows_of(name: str, device: str, quick: bool, missing: bool) -> list[Row]:
    expected = importlib.import_module(f"benchmarks.{name}").rows(device)
    if device == "cuda" and not torch.cuda.is_available():
        return page.without_gpu(expected)
    result = measured(name, device, quick, missing)
    if isinstance(result, str):
        return [row.failed(result) for row in expected]
    return [Row(**row) for row in result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=(*FAMILIES, "live_profile"), help="only these families")
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes, to see that all runs")
    parser.add_argument("--missing", action="store_true", help="only families that have no result yet")
    parser.add_argument("--family", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        name, device, store = options.family
        family(name, device, options.quick, Path(store))
        return

    STORE.mkdir(parents=True, exist_ok=True)
    start, described = time.monotonic(), machine.described()
    rows: dict[str, list[Row]] = {"cpu": [], "cuda": []}
    wanted = options.rows or [*FAMILIES, "live_profile"]
    for device, of_device in rows.items():
        for name in FAMILIES:
            if name in wanted:
                print(f"{device}: {name} ...", file=sys.stderr, flush=True)
                of_device += rows_of(name, device, options.quick, options.missing)
    profiles: Any = measured("live_profile", "cpu", options.quick, options.missing) if "live_profile" in wanted else {}
    if isinstance(profiles, str):
        print(f"No profile: {profiles}", file=sys.stderr)
        profiles = {}
    page.show(rows, profiles)
    if not options.rows and not options.quick:
        minutes = None if options.missing else (time.monotonic() - start) / 60
        PAGE.write_text(page.text(rows, profiles, described, minutes))
        print(f"Written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
