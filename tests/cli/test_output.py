"""Tables in a terminal that cannot show all signs, and versions."""

import io
import sys

import pytest
from rich.table import Table

from lightning_flatness import __version__
from lightning_flatness.cli.commands import Outcome
from lightning_flatness.cli.main import main
from lightning_flatness.cli.output import show


class Result:
    def table(self):
        return Table("‖W‖")


def test_a_sign_that_stdout_does_not_know_is_no_error(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    show(Outcome({"": Result()}))
    sys.stdout.flush()
    assert b"?W?" in written.getvalue()


def test_versions(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    line = " ".join(capsys.readouterr().out.split())
    assert line.startswith(f"lightning-flatness {__version__}, torch ")
    assert ", Python 3." in line
