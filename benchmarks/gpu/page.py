"""Write the results as Markdown, with a section for every check and every kind of cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = """# On a GPU

Written by `python -m benchmarks.gpu`, which needs PyTorch, Lightning, torchmetrics and torchvision only. Errors are
relative to the same network in float64 on the CPU. Times are medians of runs in turn.
"""
REMARKS = Path(__file__).with_name("remarks.md")  # remarks on the last run, written by hand
TITLES = {
    "families": "Ten families of torchvision, last convolution, random weights",
    "all_layers": "Every layer",
    "tf32": "TF32",
    "default_device": "With torch.set_default_device",
    "live": "Observed and own passes",
    "identical": "Training with the callback is bit-identical",
    "synchronisations": "Waits for the device in a batch",
    "products": "Products with the Hessian, points of the landscape",
    "validation": "Time and memory of validation, with over without",
    "training": "Time of a training epoch, with over without",
    "profile": "One batch",
}


def text(results: dict[str, list[dict[str, Any]]], machine: dict[str, str], minutes: float) -> str:
    """Return the whole page in Markdown."""
    parts = [HEAD, "| machine | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in machine.items())]
    parts.append(REMARKS.read_text())
    for name, title in TITLES.items():
        if name in results:
            parts.append(f"## {title}\n\n{section(results[name])}\n")
    return "\n".join([*parts, f"The run took {minutes:.1f} minutes.\n"])


def section(rows: list[dict[str, Any]]) -> str:
    """Return a table for each set of rows that have the same columns, and tables of the kernels."""
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(tuple(key for key in row if key not in ("what", "top")), []).append(row)
    parts = []
    for keys, alike in tables.items():
        parts.append(f"| | {' | '.join(keys)} |\n|---|{'---|' * len(keys)}")
        for row in alike:
            cells = [row["what"], *(shown(row[key]) for key in keys)]
            parts.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        parts.append("")
        for row in alike:
            if "top" in row:
                parts += [f"Kernels, {row['what']}:", "", "| kernel | calls | ms |", "|---|--:|--:|"]
                parts += [f"| `{kernel}` | {calls} | {ms} |" for kernel, calls, ms in row["top"]] + [""]
    return "\n".join(parts).strip()


def shown(value: Any) -> str:
    """Return the text of a cell."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
