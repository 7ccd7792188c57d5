"""Write ``docs/study.md`` and its figures from the CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies import accuracy, curves, figures, shift
from studies.analysis import MAIN
from studies.claims import claims
from studies.families import accurate, cifar, digits
from studies.findings import findings, in_short, overview, star_findings
from studies.markdown import number, percent, picture, table
from studies.measures import BASELINES, LABELS, PACKAGE
from studies.sections import family_section
from studies.stars import arm_rows, star_table
from studies.tables import read_rows
from studies.words import BELOW, DIGITS_WORDS, FOUND, HEAD, SHIFTS, STAR_WORDS

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any]]


def write(results: Path, root: Path = ROOT) -> Path:
    """Analyse the CSV files in ``results``, draw the figures, write the page, and return the path of the page."""
    page, images = root / "docs" / "study.md", root / "docs" / "images" / "study"
    images.mkdir(parents=True, exist_ok=True)
    factorial, found = family_section(results, images, digits(), "Digits: a factorial", DIGITS_WORDS)
    tests = sorted({int(row["test_images"]) for row in read_rows(results / "cifar-losses.csv")})
    words = STAR_WORDS.format(tests=" or ".join(f"{count:,}" for count in tests))
    star, of_star = family_section(results, images, cifar(), "CIFAR-10: a star", words)
    last = cifar().snapshots[-1]
    arms = arm_rows(results, cifar(), last) if of_star["taus"] else []
    if arms:
        star += "".join("\n" + star_table(results, cifar(), snapshot) for snapshot in (MAIN, last))
    done = len(read_rows(results / "cifar-configurations.csv"))
    summary = findings(found) + star_findings(of_star, done, len(cifar().configurations))
    summary += "\n" + overview({"digits": found, "CIFAR-10": of_star})
    summary = in_short({"the digits": found, "CIFAR-10": of_star}) + summary
    parts = [HEAD, FOUND + summary, not_run(results), factorial, star]
    if of_accurate := accuracy.analyse(results, accurate()):
        figures.save(figures.accuracies(accuracy.curves_of(results, accurate())), images / "accurate.png")
        parts.append(accuracy.section(results, accurate(), of_accurate))
    shifts = {part: shift.analyse(results, of()) for part, of in shift.PARTS.items()}
    parts += [shift_section(shift.PARTS[part](), rows, images) for part, rows in shifts.items() if rows]
    parts += [curves_section(results, images), speed_section(results, images)]
    parts += [claims(found, shifts, of_star, arms), numbers_section(), BELOW]
    page.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts if part))
    return page


def not_run(results: Path) -> str:
    """Return the section that lists the parts of the study without results."""
    lines = []
    for family in (digits(), cifar(), accurate()):
        done = len(read_rows(results / f"{family.name}-configurations.csv"))
        if done < len(family.configurations):
            lines.append(f"- `{family.name}`: {done} of {len(family.configurations)} networks have been run.")
    for of in (found() for found in shift.PARTS.values()):
        done = len(shift.measured(results, of)[0])
        if done < len(of.configurations):
            lines.append(f"- `{of.part}`: {done} of {len(of.configurations)} networks have been measured.")
    if not read_rows(results / "curves.csv"):
        lines.append("- `curves` has not been run.")
    lines += [
        "- Pretrained networks: there is no code for these, since the images that they would need are not here.",
        "- No part has been run on a GPU.",
    ]
    return "## What has not been run\n\n" + "\n".join(lines) + "\n"


def shift_section(of: shift.Shifts, rows: Rows, images: Path) -> str:
    """Return the section on distorted test images; ``rows`` are the results of the analysis."""
    figures.save(figures.shifted(rows), images / f"{of.part}.png")
    first, words = rows[0], SHIFTS[of.part]
    text = (
        f"{first['networks']} of {words.networks}, at {of.snapshot}, are measured on "
        f"{of.measured} test images as they are and drawn otherwise: {', '.join(of.distortions)}. {words.images}Errors are those of all "
        "test images. The test loss and the confidence are those of all test images, too; flatness and the spectrum are those of the measured ones, with their labels. The table compares changes from the images as they are: over the shifts, for one network; and over "
        "networks, for one shift. Baselines (\\*): the mean confidence of the network, which needs no labels, and the test loss. "
        f"With {first['shifts']} shifts the first kind of τ is coarse.\n"
    )
    cells = [
        (
            row["label"] + ("\\*" if row["measure"] in shift.BASELINES else ""),
            f"{number(row['over_shifts'])} [{number(row['low'])}, {number(row['high'])}]",
            f"{number(row['over_networks'])} ({number(row['over_networks_low'])} to {number(row['over_networks_high'])})",
        )
        for row in rows
    ]
    headings = ("number", "τ over shifts [95 % over networks]", "τ over networks (range over shifts)")
    caption = picture(of.part, "How changes of each number go with the change of error")
    return "\n".join([f"## {words.data} drawn otherwise\n", text, caption, table(headings, cells)])


def curves_section(results: Path, images: Path) -> str:
    """Return the section on flatness during training."""
    rows = curves.analyse(results)
    if not rows:
        return ""
    figures.save(figures.training(results), images / "curves.png")
    text = (
        f"{rows[0]['runs']} runs of {curves.EPOCHS} epochs: with a fifth of the labels wrong or none, two learning rates, "
        f"five seeds. Rules look at epochs from {curves.BURN_IN + 1} on, {curves.VALIDATION} images are for validation, and "
        "the test images are others. The validation images have right labels, and are more than the 200 training images, "
        "which helps the rules that need labels. "
        f"Rules that stop have a patience of {curves.PATIENCE}. *Needs*: what the rule needs "
        "beside the training data. The change is that from the last epoch; below zero the rule is better. Intervals are "
        "over the seeds of these four settings, not over settings. "
        f"{curves.by_setting(results)}\n"
    )
    cells = [
        (
            row["scope"], row["rule"], row["needs"], number(row["epoch"], 1), percent(row["test_error"], 2),
            f"{number(100 * row['test_error_change'])} [{number(100 * row['test_error_low'])}, "
            f"{number(100 * row['test_error_high'])}]",
            f"{number(row['test_loss_change'], 3)} [{number(row['test_loss_low'], 3)}, {number(row['test_loss_high'], 3)}]",
        )
        for row in rows
    ]  # fmt: skip
    headings = ("runs", "rule", "needs", "epoch", "test error", "change, points [95 %]", "change of test loss [95 %]")
    caption = picture("curves", "Relative flatness and test error over the epochs of twenty runs")
    return "\n".join(["## In training\n", text, caption, table(headings, cells, left=3)])


def speed_section(results: Path, images: Path) -> str:
    """Return the section on training many networks at once."""
    rows = read_rows(results / "speed.csv")
    if not rows:
        return ""
    figures.save(figures.speed(rows), images / "speed.png")
    best: dict[str, dict[str, str]] = {}
    for row in rows:
        if int(row["networks"]) == 1:
            continue  # runs alone, without vmap
        name = f"{row['data']}, batches of {row['batch_size']}"
        if name not in best or float(row["ratio"]) > float(best[name]["ratio"]):
            best[name] = row
    found = "; ".join(f"{name}: {number(row['ratio'], 1)} times with {row['networks']}" for name, row in best.items())
    text = (
        "Networks of one architecture are trained at once: their parameters are stacked, `torch.func.functional_call` and "
        "`vmap` run them side by side. They are the networks that `torch.optim` trains one by one: a test compares three epochs in float64, "
        "to 1e-6. "
        f"How many times faster a network is trained so, on one thread of a CPU, at best: {found}.\n"
        "Where that is below one, networks are trained one by one on a CPU. A single network runs without `vmap`.\n"
    )
    return "\n".join(["## Many networks at once\n", text, picture("speed", "Times faster against networks at once")])


def numbers_section() -> str:
    """Return the section that lists all measures and baselines."""
    return (
        "## What was compared\n\n"
        f"{len(PACKAGE)} measures of the package: {'; '.join(LABELS[name] for name in PACKAGE)}.\n\n"
        f"{len(BASELINES)} baselines: {'; '.join(LABELS[name] for name in BASELINES)}.\n\n"
        "Some of these are nearly one number: r_e is minus C_t, and relative flatness and its normalised form often order "
        "networks in the same way. The radii of SAM, ASAM and random perturbations are fixed.\n"
    )
