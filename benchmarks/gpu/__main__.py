"""Run checks of correctness and tables of costs on a GPU, and write a page with the results.

``python -m benchmarks.gpu --out FOLDER``. The checks run side by side, each in a process of its own. The tables of
costs follow one by one, with the most important rows first, until the time is up. Every check and every table writes
its results to a file ``NAME.json`` in the folder, and the page is ``page.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import page

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("families", "all_layers", "tf32", "default_device", "live", "identical", "synchronisations", "products")
TABLES = ("profile", "validation", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--device", default="cuda", help="'cpu' to see that all runs")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--seconds", type=float, default=440, help="for the whole run")
    parser.add_argument("--only", nargs="+", choices=(*CHECKS, *TABLES), default=[*CHECKS, *TABLES])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        one(options.one, options.device, options.quick, options.seconds, options.out)
        return

    start = time.monotonic()
    left = lambda: options.seconds - (time.monotonic() - start)  # noqa: E731
    checks = {name: begin(name, options, left() * 0.5) for name in CHECKS if name in options.only}
    for name, process in checks.items():
        end(name, process, options.out, max(1.0, options.seconds * 0.5 - (time.monotonic() - start)))
    for name in TABLES:
        if name in options.only and left() > 20:
            end(name, begin(name, options, left() - 10), options.out, left())
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))}
    text = page.text(found, machine.described(), (time.monotonic() - start) / 60)
    (options.out / "page.md").write_text(text)
    print(text)


def begin(name: str, options: argparse.Namespace, seconds: float) -> subprocess.Popen[bytes]:
    """Start a check or table in a process of its own, which stops by itself after about ``seconds``."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--out", str(options.out)]
    command += ["--device", options.device, "--seconds", str(seconds), *["--quick"] * options.quick]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if name == "identical" else dict(os.environ)
    if name in CHECKS:  # checks run side by side, so each gets few threads
        environment["OMP_NUM_THREADS"] = "2"
    log = (options.out / f"{name}.log").open("wb")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def end(name: str, process: subprocess.Popen[bytes], out: Path, seconds: float) -> None:
    """Wait for a check or table; if it fails, or takes more than ``seconds``, add the end of its log to its results."""
    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        code = "stopped: out of time"
    if code:
        lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        path = out / f"{name}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rows, {"what": name, "failed": f"{code}: {' / '.join(lines[-3:])}"}]))
    print(f"{name}: {code or 'ok'}", file=sys.stderr, flush=True)


def one(name: str, device: str, quick: bool, seconds: float, out: Path) -> None:
    """Run one check or table in this process, and write its results to a file after each row."""
    module = importlib.import_module(f"benchmarks.gpu.{'cost' if name in TABLES else 'correctness'}")
    if device == "cpu":
        torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    for row in getattr(module, name)(device, quick, time.monotonic() + seconds):
        rows.append(row)
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
