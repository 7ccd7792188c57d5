"""Parse the arguments of the command line. This module does not import torch, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.versions import versions

NESTED = ("--model.", "--data.")
SUFFIXES = (".html", ".json", ".npz")
ABOUT = {
    "measure": "Flatness of the layers of a network.",
    "compare": "Several networks side by side: which is flatter, by how much, and how sure that is.",
    "spectrum": "Largest eigenvalues, trace and density of the Hessian of the whole network.",
    "landscape": "The loss on a line or a plane through the weights.",
}
EPILOG = """\
Lower is flatter. A checkpoint of LightningCLI knows its classes. For others give --model and --data with their
arguments, or the --config of the run:

  lightning-flatness measure last.ckpt --model project.Net --model.width 64 --data project.Digits
  lightning-flatness compare a.ckpt b.ckpt --config config.yaml --split train -o report.html

Exit codes: 0 done; 1 the command line is wrong; 2 the measurement failed, or an option does not fit network or data.
"""


class UsageError(FlatnessError):
    """The command line is wrong: an option, a class or an argument of a class is wrong, or a file does not exist."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Options can be read as attributes, such as ``command.split``.
    """

    name: str
    checkpoints: tuple[Path, ...]
    options: argparse.Namespace
    arguments: Mapping[str, Sequence[str]]  # from "model" and "data" to, e.g., ["--model.width=64"]
    words: tuple[str, ...]  # the whole command line, before parsing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.options, name)


def parse(words: Sequence[str]) -> Command:
    """Parse the words of a command line; raise a :class:`UsageError` if they are not a valid command.

    Example:
        >>> command = parse(["measure", "a.ckpt", "--model", "net.Net", "--model.width", "64", "--max-samples", "100"])
        >>> command.name, command.checkpoints, command.max_samples, command.arguments["model"]
        ('measure', (PosixPath('a.ckpt'),), 100, ['--model.width=64'])
    """
    plain, nested = _nested(words)
    options = _parser().parse_args(plain)
    if options.command == "compare" and len(options.checkpoints) < 2:
        raise UsageError("compare needs two checkpoints or more.")
    if options.command != "compare" and len(options.checkpoints) > 1:
        raise UsageError(
            f"{options.command} takes one checkpoint, and {len(options.checkpoints)} were given; compare takes several."
        )
    return Command(options.command, tuple(map(Path, options.checkpoints)), options, nested, tuple(words))


def _nested(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate the arguments of the user's classes, such as ``--model.width 64``, from all other words.

    Returns the other words, and a mapping from ``"model"`` and ``"data"`` to arguments like ``--model.width=64``.
    """
    plain: list[str] = []
    nested: dict[str, list[str]] = {"model": [], "data": []}
    remaining = iter(words)
    for word in remaining:
        if not word.startswith(NESTED):
            plain.append(word)
            continue
        if "=" not in word:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UsageError(f"{word} needs a value.")
            word = f"{word}={value}"
        nested[word[2:].partition(".")[0]].append(word)
    return plain, nested


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lightning-flatness",
        description="How flat the minima of trained networks are: exact flatness of checkpoints.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=versions(), help="show versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in ABOUT.items():
        usage = f"%(prog)s {'A B ...' if name == 'compare' else 'CKPT'} [options]"
        command = commands.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)
        _add_checkpoints(command)
        _add_network(command)
        _add_data(command, name)
        _add_own(command, name)
        _add_output(command, name)
    return parser


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    about = "checkpoints of Lightning, or state dicts (.pt, .pth, .safetensors)"
    parser.add_argument("checkpoints", metavar="CKPT", nargs="+", help=about)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--config", type=Path, metavar="FILE", help="config.yaml of a LightningCLI run: classes and their arguments")
    add("--model", metavar="CLASS", help="class of the network, package.Class; its arguments as --model.ARG VALUE")
    add("--network", metavar="NAME", help="attribute of the LightningModule that is the network, such as net")
    add("--inputs", choices=("step", "batch"), help=(
        "give the network what the validation step gives it (default), or the inputs of the batch, without a step"
    ))  # fmt: skip
    add("--targets", metavar="KEY", help=(
        "entry of a batch that has the targets: a key, an attribute, or a position such as 1 (default: an entry like "
        "'label', or the second of two)"
    ))  # fmt: skip
    add("--trust", action="store_true", help="unpickle Python objects in the checkpoint, which can run code")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps")


def _add_data(parser: argparse.ArgumentParser, command: str) -> None:
    default = {"spectrum": "512", "landscape": "512"}.get(command, "all of val, 4096 of train")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="CLASS", help="class of the data module; its arguments as --data.ARG VALUE")
    add("--split", choices=("val", "train"), default="val", help="data to measure on (default: val)")
    add("--loader", type=_whole(0), default=0, metavar="N", help="which of several validation loaders (default: 0)")
    add("--max-samples", type=_whole(1), metavar="N", help=f"a fixed random subset (default: {default})")
    add("--loss", default="cross_entropy", metavar="LOSS", help=(
        "cross_entropy (default), binary_cross_entropy, mse, or package.function from (logits, targets) to the loss "
        "of every sample"
    ))  # fmt: skip
    add(
        "--seed",
        type=_whole(0),
        metavar="N",
        help="seed of all random choices (default: seed_everything of --config, or 0)",
    )


def _add_own(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument_group(command).add_argument
    add("--dtype", choices=("float32", "float64"), help="precision of the passes (default: the network's)")
    if command in ("measure", "compare"):
        add("--layers", action="append", metavar="NAMES", help=(
            "one of last (default), classifier and all, or names or patterns with commas between them"
        ))  # fmt: skip
        add("--strict", action="store_true", help="fail rather than return numbers that are not exact")
    if command == "compare":
        add("--no-train-loss", action="store_true", help="do not measure the training loss")
    if command == "spectrum":
        add("--top-k", type=_whole(0), default=5, metavar="N", help="number of largest eigenvalues (default: 5)")
        add("--steps", type=_whole(1), default=50, metavar="N", help="Lanczos steps of every probe (default: 50)")
        add("--probes", type=_whole(1), default=10, metavar="N", help="random probes (default: 10)")
    if command == "landscape":
        add("--axes", choices=("random", "hessian"), default="random", help="kind of directions (default: random)")
        add("--line", action="store_true", help="a line instead of a plane")
        add("--steps", type=_whole(2), default=25, metavar="N", help="points along every axis (default: 25)")
        add("--span", type=_positive, default=1.0, metavar="S", help="coordinates go from -S to S (default: 1)")


def _add_output(parser: argparse.ArgumentParser, command: str) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("-o", "--output", action="append", default=[], type=_output, metavar="FILE", help=(
        "write a page (.html), numbers (.json) or the whole result (.npz); may be given several times"
    ))  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show where an error comes from")


def _whole(least: int) -> Any:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, at least {least}")
        return int(text)

    return whole


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' must be a positive number")
    return value


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{text}' must end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}' for '{text}'")
    return path
