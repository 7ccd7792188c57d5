"""The results as Markdown."""

from __future__ import annotations

from typing import Any

HEAD = """# On one GPU

Written by `python -m benchmarks.gpu`. Errors are relative to the same network in float64 on the CPU; times are
medians of runs in turn.
"""
TITLES = {
    "families": "Ten families of torchvision",
    "all_layers": "Every layer",
    "tf32": "TF32",
    "default_device": "With torch.set_default_device",
    "live": "Observed and own passes",
    "identical": "Training is bit-identical",
    "synchronisations": "Waits for the device",
    "products": "Products with the Hessian, points of the landscape",
    "validation": "Time and memory of validation, with over without",
    "training": "Time of a training epoch, with over without",
    "profile": "One batch",
}


def text(found: dict[str, list[dict[str, Any]]], machine: dict[str, str], minutes: float) -> str:
    parts = [HEAD, "| machine | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in machine.items())]
    for name, title in TITLES.items():
        if name in found:
            parts.append(f"## {title}\n\n" + "\n".join(line(row) for row in found[name]) + "\n")
    return "\n".join([*parts, f"The run took {minutes:.1f} minutes.\n"])


def line(row: dict[str, Any]) -> str:
    """One row as an item of a list; a list of rows within it as items below."""
    cells = [f"{key} {shown(value)}" for key, value in row.items() if key not in ("what", "top")]
    below = [f"  - {' · '.join(map(str, item))}" for item in row.get("top", [])]
    return "\n".join([f"- **{row['what']}**: {'; '.join(cells)}", *below])


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
