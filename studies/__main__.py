"""Run the study: ``python -m studies digits``; ``--help`` lists the parts.

An interrupted part can be started again and continues where it stopped. The part ``page`` needs only the CSV files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from studies.families import FAMILIES
from studies.running import RESULTS, Settings, run_family

PARTS = {
    "digits": "216 networks on scikit-learn's digits, a factorial (seven minutes on two cores with --jobs 2)",
    "cifar": "66 networks on CIFAR-10, a star (an hour on two fast cores)",
    "accurate": "ten networks of real accuracy on CIFAR-10 (75 minutes on two cores, with 10,000 training images)",
    "shift": "flatness on digits drawn otherwise",
    "shift-cifar": "flatness on CIFAR-10 drawn otherwise, of networks that `cifar --keep-weights` has trained",
    "curves": "flatness in training, twenty runs",
    "speed": "what training many networks at once brings",
    "page": "write docs/study.md from the tables",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description=__doc__.splitlines()[0],
        epilog="parts: " + "; ".join(f"{part}: {what}" for part, what in PARTS.items()),
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="part", help=", ".join(PARTS))
    parser.add_argument("--arrays", type=Path, help="folder of .npy files of CIFAR-10 to use, as examples/cifar10.py")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision finds CIFAR-10")
    parser.add_argument("--download", action="store_true", help="let torchvision download it")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each if there are several")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; a later run goes on")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many stacks of networks")
    parser.add_argument("--limit", type=int, help="train so many stacks of networks only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where unfinished training is kept")
    parser.add_argument("--keep-weights", action="store_true", help="keep the weights of all snapshots there")
    options = vars(parser.parse_args(arguments))
    parts, console = options.pop("parts"), Console()
    settings = Settings(**options)
    if settings.device != "cpu" and settings.jobs > 1:
        parser.error("several processes share no GPU here: give --jobs 1")
    for part in parts:
        if part in FAMILIES:
            run_family(part, settings, console)
        else:
            run_other(part, settings, console)


def run_other(part: str, settings: Settings, console: Console) -> None:
    if part == "page":
        from studies.page import write

        console.print(f"Written: {write(settings.results)}")
        return
    from studies import curves, shift, speed

    if part in shift.PARTS:
        shift.run(shift.PARTS[part](), settings, console)
    else:
        {"curves": curves.run, "speed": speed.run}[part](settings, console)


if __name__ == "__main__":
    main()
