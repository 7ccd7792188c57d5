"""The entry point of the command line. It runs a command, and prints the results or one line with the error."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_flatness.cli.arguments import UsageError, parse
from lightning_flatness.errors import FlatnessError

DONE, USAGE, NOT_MEASURED, INTERRUPTED = 0, 1, 2, 130
PACKAGE = str(Path(__file__).parents[1])
STANDARD_LIBRARY = (str(Path(warnings.__file__).parent), "<frozen")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line (by default ``sys.argv[1:]``) and return the exit code of the process.

    The exit code is 0 on success, 1 if the command line is wrong, 2 if the measurement failed, and 130 after Ctrl-C.

    Example:
        >>> main(["measure", "nothing.ckpt"])  # prints: lightning-flatness: There is no file 'nothing.ckpt'.
        1
    """
    words = sys.argv[1:] if words is None else list(words)
    try:
        command = parse(words)
        if "" not in sys.path:
            sys.path.insert(0, "")  # find classes in the current folder, as python -m does
        with _noted() as notes:
            from lightning_flatness.cli.commands import run
            from lightning_flatness.cli.output import show, write

            outcome = run(command)
        outcome = replace(outcome, notes=[*outcome.notes, *notes])
        if not command.quiet:
            show(outcome)
        for path in command.output:
            write(path, outcome)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, words)
    except UsageError as error:
        return _fail(str(error), USAGE, words)
    except FlatnessError as error:
        return _fail(_in_words_of_options(str(error)), NOT_MEASURED, words)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        return _fail(f"{type(error).__name__}: {reason} (--debug shows where)", NOT_MEASURED, words)
    return DONE


def _fail(message: str, code: int, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    sys.stderr.write(f"lightning-flatness: {' '.join(message.split())}\n")
    return code


def _in_words_of_options(message: str) -> str:
    """Add the matching options of the command line to a message that names arguments of a callback, e.g. ``model=``."""
    if "model=" in message:
        message += " On the command line, give --network NAME."
    if "layers=" in message:
        message += " On the command line, give --layers NAMES."
    if "batch_fn=" in message:
        message += (
            " On the command line, --targets KEY names the entry of the batch that has the targets, and --inputs batch "
            "gives the network the inputs of the batch. Other batches need Python."
        )
    return message


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Silence Lightning in a ``with`` block, and collect the warnings of this package and of the user's code.

    Yields a list. It is empty until the block ends, and then holds the texts of the warnings.
    """
    notes: list[str] = []
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:
        logging.disable(disabled)
    texts = (" ".join(str(one.message).split()) for one in caught if _is_ours(one))
    notes += dict.fromkeys(texts)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    """Return whether a warning is of this package or of the user's code, and not of another library."""
    path = warning.filename
    is_of_a_library = "site-packages" in path or path.startswith(STANDARD_LIBRARY)
    return path.startswith(PACKAGE) or not is_of_a_library
