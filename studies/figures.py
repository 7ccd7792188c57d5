"""Draw the figures of the page from the tables of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from studies import accuracy, curves, shift
from studies.analysis import MAIN, MAIN_TARGETS, SCOPES, TARGETS, Sample
from studies.measures import BASELINES, LABELS, NEGATED

Rows = list[dict[str, Any]]
PACKAGE_COLOUR, BASELINE_COLOUR, SHADES = "#0b3c6f", "#d1571a", ("#3f9fd8", "#00805f", "#d1571a")
SCATTERED = ("relative_flatness.last", "hessian_trace.last", "asam", "feature_spread")


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=90)


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG without date and versions, so that the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Software": None})


def plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def logarithmic(ax: Any, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Make the horizontal axis logarithmic, with plain numbers as labels at ``subs`` times powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())


def intervals(rows: Rows, family: str) -> Figure:
    """Draw τ of every measure with its 95 % interval, baselines first, with a panel for each target and scope."""
    known = {row["measure"] for row in rows if row["snapshot"] == MAIN}
    names = [name for name in LABELS if name in known]
    drawn = figure(12, 0.19 * len(names) + 1.2)
    panels = drawn.subplots(1, 4, sharey=True)
    cells = [(target, scope) for target in MAIN_TARGETS for scope in SCOPES]
    for ax, (target, scope) in zip(panels, cells, strict=True):
        chosen = {
            row["measure"]: row
            for row in rows
            if (row["snapshot"], row["target"], row["scope"]) == (MAIN, target, scope)
        }
        for place, name in enumerate(names):
            row = chosen[name]
            colour = BASELINE_COLOUR if name in BASELINES else PACKAGE_COLOUR
            ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2)
            ax.plot(row["tau"], place, "s" if name in BASELINES else "o", color=colour, markersize=4)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(f"{target}, {scope}", fontsize=9, loc="left")
        ax.set_xlabel("Kendall's τ", fontsize=9)
        plain(ax)
    panels[0].set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=7.5)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    drawn.suptitle(f"{family}, snapshots at {MAIN}. Orange squares: baselines. Bars: 95 % intervals.", fontsize=10)
    return drawn


def heat(rows: Rows, family: str) -> Figure:
    """Draw a heat map of τ: measures as rows, targets and snapshots as columns, and a panel for each scope."""
    snapshots = list(dict.fromkeys(row["snapshot"] for row in rows))
    known = {row["measure"] for row in rows}
    names = [name for name in LABELS if name in known]
    columns = [(target, snapshot) for target in TARGETS for snapshot in snapshots]
    drawn = figure(12, 0.19 * len(names) + 1.8)
    panels = drawn.subplots(1, 2, sharey=True)
    for ax, scope in zip(panels, SCOPES, strict=True):
        at = {(r["measure"], r["target"], r["snapshot"]): r["tau"] for r in rows if r["scope"] == scope}
        values = np.array([[at.get((name, *column), np.nan) for column in columns] for name in names], dtype=float)
        picture = ax.imshow(values, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -0.8, 0.8))
        for edge in range(len(snapshots), len(columns), len(snapshots)):
            ax.axvline(edge - 0.5, color="black", linewidth=0.8)
        ax.axhline(sum(name in BASELINES for name in names) - 0.5, color="black", linewidth=0.8)
        ax.set_xticks(range(len(columns)), [snapshot for _, snapshot in columns], rotation=90, fontsize=7)
        for number, target in enumerate(TARGETS):
            ax.text((number + 0.5) * len(snapshots) - 0.5, -0.8, target, ha="center", fontsize=8)
        ax.set_title(scope, fontsize=10, pad=16)
    panels[0].set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=7.5)
    drawn.colorbar(picture, ax=panels, shrink=0.5, label="Kendall's τ")
    drawn.suptitle(f"{family}: all measures, targets and snapshots; baselines above the line", fontsize=10)
    return drawn


def scatter(sample: Sample, family: str) -> Figure:
    """Draw scatter plots of loss gap and test error against two measures and two baselines (``SCATTERED``)."""
    drawn = figure(10, 5)
    noise = np.array([float(row["label_noise"]) for row in sample.rows])
    for row, (target, axes) in enumerate(zip(MAIN_TARGETS, drawn.subplots(2, 4, sharey="row"), strict=True)):
        for ax, name in zip(axes, SCATTERED, strict=True):
            x = sample.column(name) * (-1 if name in NEGATED else 1)
            for level, colour in zip(sorted(set(noise)), SHADES, strict=False):
                mine = noise == level
                ax.plot(x[mine], sample.targets[target][mine], ".", color=colour, label=f"{level:g}", markersize=5)
            logarithmic(ax)
            ax.tick_params(labelsize=7)
            ax.set_xlabel(LABELS[name] if row else "", fontsize=8)
            plain(ax)
        axes[0].set_ylabel(target, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, title="label noise", loc="outside right upper", fontsize=7, title_fontsize=7)
    drawn.suptitle(f"{family}: {len(sample)} networks at {sample.snapshot}", fontsize=10)
    return drawn


def training(results: Path) -> Figure:
    """Draw relative flatness on training and validation data, and the test error, over the epochs of all runs."""
    of = curves.curves_of(results)
    noise = {c.name: c.label_noise for c in curves.family().configurations}
    parts = ("train_relative_flatness", "val_relative_flatness", "test_error")
    drawn = figure(10, 3.2)
    labels = ("relative flatness, training", "relative flatness, validation", "test error")
    for ax, part, label in zip(drawn.subplots(1, 3), parts, labels, strict=True):
        for name, curve in of.items():
            colour = SHADES[0] if not noise[name] else SHADES[2]
            ax.plot(curve["epoch"], curve[part], color=colour, linewidth=0.8, alpha=0.7)
        ax.set_yscale("log")
        ax.set_title(label, fontsize=9, loc="left")
        ax.set_xlabel("epoch", fontsize=9)
        ax.tick_params(labelsize=7, which="both")
        plain(ax)
    drawn.suptitle(
        f"{len(of)} runs on the digits; blue: no label noise, orange: a fifth of the labels wrong", fontsize=10
    )
    return drawn


def shifted(rows: Rows) -> Figure:
    """Draw how changes in measures correlate with changes in the error: over shifts, and over networks."""
    drawn = figure(8, 3.2)
    left, right = drawn.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        colour = BASELINE_COLOUR if row["measure"] in shift.BASELINES else PACKAGE_COLOUR
        left.plot([row["low"], row["high"]], [place, place], color=colour)
        left.plot(row["over_shifts"], place, "o", color=colour, markersize=4)
        right.plot([row["over_networks_low"], row["over_networks_high"]], [place, place], color=colour)
        right.plot(row["over_networks"], place, "o", color=colour, markersize=4)
    left.set_title("over the shifts, for one network (mean, 95 %)", fontsize=9, loc="left")
    right.set_title("over networks, for one shift (mean, range)", fontsize=9, loc="left")
    for ax in (left, right):
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlim(-1.05, 1.05)
        ax.set_xlabel("Kendall's τ of the changes", fontsize=9)
        plain(ax)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.5, -0.5)
    drawn.suptitle("Do changes of a number go with changes of the error? Orange: baselines", fontsize=10)
    return drawn


def accuracies(networks: dict[str, Rows]) -> Figure:
    """Draw the test error against three measures: a line over the epochs for every network, with a dot at the end."""
    drawn = figure(10, 3.2)
    arms = list(dict.fromkeys(rows[0]["arm"] for rows in networks.values()))
    for ax, name in zip(drawn.subplots(1, 3, sharey=True), accuracy.COMPARED, strict=True):
        for rows in networks.values():
            colour = SHADES[arms.index(rows[0]["arm"])]
            points = [row[name] for row in rows], [100 * row["test_error"] for row in rows]
            ax.plot(*points, color=colour, linewidth=0.8, alpha=0.7)
            ax.plot(points[0][-1], points[1][-1], "o", color=colour, markersize=4)
        logarithmic(ax, subs=(1, 1.5, 2, 3, 5, 7))
        ax.set_xlabel(LABELS[name], fontsize=9)
        ax.tick_params(labelsize=7, which="both")
        plain(ax)
    drawn.axes[0].set_ylabel("test error, %", fontsize=9)
    for arm, colour in zip(arms, SHADES, strict=False):
        drawn.axes[0].plot([], [], "o-", color=colour, markersize=4, label=arm)
    drawn.axes[0].legend(fontsize=8)
    drawn.suptitle("Each line is a network over its epochs; the dot is the last epoch", fontsize=10)
    return drawn


def speed(rows: Rows) -> Figure:
    """Draw how many times faster a network is trained in a stack of networks than alone."""
    drawn = figure(6, 3)
    ax = drawn.subplots()
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        line = lines.setdefault((row["data"], row["batch_size"]), [])
        line.append((float(row["networks"]), float(row["ratio"])))
    for (data, batch_size), points in lines.items():
        ax.plot(*zip(*points, strict=True), "o-", label=f"{data}, batches of {batch_size}", markersize=4)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xlabel("networks trained at once")
    ax.set_ylabel("times faster, a network")
    ax.set_ylim(0)
    ax.legend(fontsize=8)
    plain(ax)
    return drawn
