"""The commands ``measure`` and ``compare``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_flatness as lf
from benchmarks.numbers import cases, training

LIMIT, LIMIT_FLOAT32 = 1e-12, 1e-5
KINDS = ("label", "text", "share")
# Fields of results that are not compared: rounding errors, vectors with an arbitrary sign, counts, and long tensors.
LEFT_OUT = {"residual_norm", "residuals", "eigenvectors", "num_products", "fingerprint", "computed", "parameters"}
COSTS = ("backward_passes", "multiplications", "memory")


def flat(found: Any, name: str = "") -> dict[str, Any]:
    """Flatten a result to numbers, labels and texts by name.

    Names of labels begin with ``label`` and names of texts with ``text``. A tensor becomes its norm, and three entries
    divided by the norm, whose names begin with ``share``. ``name`` is the prefix of all names.
    """
    if isinstance(found, lf.FlatnessReport):
        sums = ("hessian_trace", "relative_flatness", "weight_norm", "num_samples", "standard_errors", "exact")
        parts: dict[str, Any] = {key: getattr(found, key) for key in sums} | dict(found.layers)
        left_out = {f"text {name}left out {layer}": reason for layer, reason in found.left_out.items()}
        return {**flat(parts, name), f"label {name}left out": sorted(found.left_out), **left_out}
    if hasattr(found, "deviation"):  # LayerInfo: how a layer was measured
        about = {key: getattr(found, key) for key in ("exact", "method", "kernel", "kind", "classifier")}
        costs = ", ".join(f"{key} {getattr(found, key)}" for key in COSTS)
        texts = {f"text {name}reason": found.reason, f"text {name}costs": costs}
        return {f"label {name}{key}": value for key, value in about.items()} | texts
    if is_dataclass(found):
        return flat({one.name: getattr(found, one.name) for one in fields(found) if one.name not in LEFT_OUT}, name)
    if isinstance(found, Tensor) and found.ndim:
        entries = found.detach().double().flatten()
        norm = float(entries.norm())
        some = {0, len(entries) // 3, len(entries) - 1} if len(entries) else ()
        return {f"{name}norm": norm} | {f"share {name}{index}": float(entries[index]) / (norm or 1.0) for index in some}
    if isinstance(found, Mapping):
        return {full: value for key, part in found.items() for full, value in flat(part, f"{name}{key} ").items()}
    if isinstance(found, (list, tuple)):
        return flat(dict(enumerate(found)), name)
    if isinstance(found, (bool, str, type(None))):
        return {name if name.startswith(KINDS) else f"label {name}": found}
    return {name: float(found)}


def measure(out: Path, wanted: str) -> int:
    """Run the cases whose names contain ``wanted``, write the results to ``out``, and return the exit code.

    The error of a case is recorded as its result. The exit code is 1 if a case raises an error and its name does not
    begin with ``refused``, or if it raises none and its name does.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start, found, slowest, failed = time.perf_counter(), {}, [], []
    for name, case in {**cases.cases(), **training.cases()}.items():
        if wanted not in name:
            continue
        begun = time.perf_counter()
        try:
            found[name] = {" ".join(key.split()): value for key, value in flat(case()).items()}
        except Exception as error:
            found[name] = {"label error": type(error).__name__, "text error": str(error)}
        if ("label error" in found[name]) != name.startswith("refused"):
            failed.append(f"{name}: {found[name]}")
        slowest.append((time.perf_counter() - begun, name))
    out.write_text(json.dumps({"package": str(Path(lf.__file__).parent), "cases": found}, indent=1))
    numbers = sum(isinstance(value, float) for one in found.values() for value in one.values())
    print(f"{len(found)} cases, {numbers} numbers of {Path(lf.__file__).parent}, {time.perf_counter() - start:.0f} s")
    print("slowest:", ", ".join(f"{name} {seconds:.1f} s" for seconds, name in sorted(slowest)[:-5:-1]))
    print(*failed, sep="\n")
    return bool(failed)


def difference(name: str, one: float, other: float) -> float:
    """Return the relative difference of two numbers; the absolute difference if they are shares or cosines."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    absolute = name.startswith("share") or "cosine" in name
    apart = abs(one - other) / (1.0 if absolute else max(abs(one), abs(other)))
    return apart if math.isfinite(apart) else math.inf


def compare(old: Path, new: Path) -> int:
    """Print all differences between two files, and return the exit code: 1 if numbers or labels differ.

    Reworded texts are printed, too, but they do not count as differences.
    """
    before, after = (json.loads(path.read_text()) for path in (old, new))
    print(f"{before['package']} and {after['package']}")
    before, after = before["cases"], after["cases"]
    wrong = [f"missing: {name}" for name in sorted(before.keys() ^ after.keys())]
    reworded: list[str] = []
    largest = {LIMIT: (0.0, "none"), LIMIT_FLOAT32: (0.0, "none")}
    for name in [name for name in before if name in after]:
        limit = LIMIT_FLOAT32 if "float32" in name else LIMIT
        for key in sorted(before[name].keys() | after[name].keys()):
            pair = before[name].get(key, "nothing"), after[name].get(key, "nothing")
            if all(isinstance(value, float) for value in pair):
                apart = difference(key, *pair)
                if apart > largest[limit][0]:
                    largest[limit] = apart, f"{name}: {key}"
                if apart > limit:
                    wrong.append(f"{apart:.1e}: {name}: {key}: {pair[0]!r}, {pair[1]!r}")
            elif pair[0] != pair[1]:
                is_text = key.startswith("text")
                (reworded if is_text else wrong).append(f"{name}: {key}: {pair[0]!r} -> {pair[1]!r}")
    print(*(f"reworded: {text}" for text in dict.fromkeys(reworded)), *wrong, sep="\n")
    print(f"{len(before.keys() & after.keys())} cases, {len(reworded)} texts reworded, {len(wrong)} differences")
    for limit, (apart, where) in largest.items():
        print(f"largest relative difference of those that may differ by {limit:.0e}: {apart:.1e} ({where})")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numbers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--only", default="", help="cases whose names contain this")
    command = commands.add_parser("compare")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command = commands.add_parser("rank", help="one of the processes of a group; started by measure")
    command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        return measure(arguments.out, arguments.only)
    if arguments.command == "compare":
        return compare(arguments.old, arguments.new)
    return training.on_this_rank(arguments.folder, flat)


if __name__ == "__main__":
    sys.exit(main())
