"""Command lines in documents are understood, and the example's README runs."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lightning_flatness.cli.arguments import ABOUT, parse

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/command-line.md", "examples/cli/README.md"]
EXAMPLE = ROOT / "examples" / "cli"


def command_lines(page):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [line.partition("  #")[0] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_understood(page):
    lines = [line for line in command_lines(page) if line.startswith("lightning-flatness")]
    assert lines or page == "README.md"
    for line in lines:
        parse(shlex.split(line)[1:])


@pytest.mark.parametrize("command", ABOUT)
def test_the_page_has_every_option(command, capsys):
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    options = set(re.findall(r"^  (?:-\w.*, )?(--[a-z][a-z-]*)", capsys.readouterr().out, flags=re.MULTILINE))
    assert len(options) > 15
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert {option for option in options if not re.search(rf"`{option}\b(?!-)", text)} == set()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, run):
    folder = tmp_path / "cli"
    shutil.copytree(EXAMPLE, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for line in command_lines("examples/cli/README.md")[1:]:
        program, *words = shlex.split(line)
        if program == "python":
            monkeypatch.setattr(sys, "argv", [*words, "--trainer.max_epochs", "1"])
            runpy.run_path(words[0], run_name="__main__")
        else:
            assert run(*words)[0] == 0
    assert "Comparison of small-batch and large-batch" in (folder / "report.html").read_text()
    sys.modules.pop("digits_cli")
