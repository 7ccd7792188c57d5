"""Show the results as a table in the terminal, and as docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.live_profile import Part, lines
from benchmarks.rows import NO_GPU, Row

HEADINGS = ("what", "against", "ratio", "goal", "met", "how")

HEAD = """# Benchmarks

What measuring costs, as ratios within one run. Written by `make bench`.

Figures of one GPU are in [gpu.md](gpu.md).

- In every row both sides have the same batch, threads and precision; all are run in turn, after a warm-up, and medians
  of wall-clock time are compared. *Processor time* is the same ratio in seconds of all cores together; it suffers less
  from what else the machine does. All raw times are at the end of this page.
- What is freed stays with the process (`MALLOC_MMAP_THRESHOLD_=33554432`, `MALLOC_TRIM_THRESHOLD_=4294967296`). By
  default glibc gives much of it back after every layer and gets it anew: a forward pass of the ResNet-18 below then has
  20,000 to 50,000 page faults, as the heap happens to lie, and takes 200 to 260 ms instead of 180. Whatever else a
  program does can move it from one to the other, this callback as well; epochs of the same task then differ by 15 %.
- Memory is the peak of resident memory (of what torch allocates, on a GPU) above what was resident before, in a process
  of its own that gives back what it frees (both variables at 131072; what glibc keeps for later differs by a half from
  run to run); medians.
- *n x faster*: the other takes n times as long. *exponent*: the slope of a straight line through the logarithms of the
  points.
- Peers are run as their documentation says, in the newest release that installs, and a ratio is there only if they
  give the same number: to 1e-3 if they are exact, within four standard errors if they estimate. What is extrapolated
  says so.
- A row without a ratio gives the reason.
"""

WHY = """## Why goals are missed

- **Validation epochs.** What is added per batch is the contraction, products of `S x S` numbers for every sample, which
  go through the cache a few times (see the table above); gradients of the tail; and 1.5 milliseconds of Python, more
  where the layers of the network empty the caches in between (in the ResNet-18, asking every function whether it takes
  the kernel is two milliseconds by itself). Two cores hardly share this work, as they do the forward pass. Torch has
  no operation for the contraction as a whole: the products, multiplications and sums of the ResNet-18's take 5.6
  milliseconds with warm caches and nothing around them, which is all of the goal, and 7 to 10 within an epoch. At the
  limits of the table, with no Python at all, a ResNet-18 would pay 2 %; for a ResNet-20 they add up to a millisecond,
  all of the goal. A network with more work before its last convolution pays less in proportion. Of an epoch of 10,000
  images, the trial at its beginning is half a percent to one.
- **ResNet-50, 1,000 classes.** With all classes, `S² K / 2` multiplications are 2.1e9 for every image, half of the
  4.1e9 of the forward pass: at the same speed +51 %, so +35 % cannot be. Where 150 classes carry all but 1e-6 of the
  probability, the certified bound of 1e-6 on relative flatness keeps about 360, that is +18 % at the same speed.
- **PyHessian.** A probe of the last convolution alone takes milliseconds and some 1,400 are needed; a
  ten-thousandth of that is less than a thirtieth of one forward pass.
- **All layers.** Nine passes of columns take 0.9 times ten bare passes, the products `J` at the highest speed seen here
  0.4 times, and two forward passes 0.15: 1.4 before anything is certified. BackPACK takes five to six times as long as
  ten bare passes, so ten times faster would be less than the columns alone.
- **Memory and the images in a batch.** A batch is run whole once, as in your own validation, to compare parts with it;
  its memory is that of this forward pass. Over batches and classes it is flat.
"""

PROFILE = """## Where the time goes

A batch of {samples} images of a {name}, 32x32, whose forward pass is observed as in validation. *Limit*: the
operations (*GFLOP*) at {gflops:.0f} GFLOP/s, or the bytes that must be read and written at least once (*MB*) at
{gbytes:.0f} GB/s, whichever takes longer; both speeds were measured in the same run (a matrix product of 2048x2048, a
copy of 256 MB).
A cell is empty where a part is mostly Python and small tensors.

"""


def table(rows: list[Row], title: str) -> Table:
    """Return the table of the rows for the terminal."""
    shown = Table(*(Column(heading, overflow="fold") for heading in HEADINGS), title=title, show_lines=True)
    for row in rows:
        shown.add_row(*(cell.replace("**", "") for cell in row.cells()))
    return shown


def show(rows: dict[str, list[Row]], profiles: dict[str, dict[str, Any]]) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    for device, of_device in rows.items():
        if of_device:
            console.print(table(of_device, "On the CPU" if device == "cpu" else "On a GPU"))
    for name, profile in profiles.items():
        console.print(name, *profile_lines(profile), sep="\n", markup=False, soft_wrap=True)


def profile_lines(profile: dict[str, Any]) -> list[str]:
    return lines([Part(**part) for part in profile["parts"]], profile["limits"])


def text(
    rows: dict[str, list[Row]], profiles: dict[str, dict[str, Any]], machine: dict[str, str], minutes: float | None
) -> str:
    """Return the page in Markdown."""
    parts = [HEAD, "| machine | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in machine.items())]
    for device, of_device in rows.items():
        missed = sum(row.met is False for row in of_device)
        met, goals = sum(row.met is True for row in of_device), sum(row.goal is not None for row in of_device)
        title = "On the CPU" if device == "cpu" else "On a GPU"
        summary = f"{met} of {goals} goals are met, {missed} are not, {goals - met - missed} were not measured."
        parts.append(f"## {title}\n\n{summary}\n\n" + markdown(of_device))
    for number, (name, profile) in enumerate(profiles.items()):
        speeds = {"gflops": profile["limits"]["flops"] / 1e9, "gbytes": profile["limits"]["bytes"] / 1e9}
        head = PROFILE.format(samples=64, name=name, **speeds) if not number else f"The same of a {name}:\n\n"
        parts.append(head + "\n".join(profile_lines(profile)) + "\n")
    parts.append(WHY)
    raw = [line for of_device in rows.values() for row in of_device for line in raw_lines(row)]
    block = "```text\n" + "\n".join(raw) + "\n```\n"
    took = f" The whole run took {minutes:.0f} minutes." if minutes else ""
    parts.append(f"## All runs\n\nSeconds, unless MB is said.{took}\n\n{block}")
    return "\n".join(parts)


def markdown(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells())} |" for row in rows]
    return "\n".join(lines) + "\n"


def raw_lines(row: Row) -> list[str]:
    if not row.raw:
        return []
    head = f"{row.what}; against: {row.against}"
    return [head] + [f"  {name}: " + " ".join(f"{value:.4g}" for value in values) for name, values in row.raw.items()]


def without_gpu(rows: list[Row]) -> list[Row]:
    return [row.failed(NO_GPU) for row in rows]
