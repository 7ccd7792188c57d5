"""Tables, files and help of the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest

import lightning_flatness as lf
from lightning_flatness.cli.arguments import ABOUT
from lightning_flatness.cli.main import _noted, main
from tests.cli import project
from tests.cli.conftest import DATA

NET = ["--model", "tests.cli.project.Net"]


def test_one_line_gives_the_table(cli_run, run):
    code, out, err = run("measure", cli_run / "last.ckpt")
    assert code == 0
    assert "net.2" in out
    assert "exact" in out
    assert "GPU available" not in out + err
    assert "Traceback" not in err


def test_one_line_gives_all_files(cli_run, run, tmp_path):
    files = [tmp_path / f"report{suffix}" for suffix in (".html", ".json", ".npz")]
    words = [word for file in files for word in ("-o", file)]
    assert run("measure", cli_run / "last.ckpt", *words, "--quiet") == (0, "", "")
    numbers = json.loads(files[1].read_text())
    report = lf.FlatnessReport.load(files[2])
    assert numbers["relative_flatness"] == report.relative_flatness
    page = files[0].read_text()
    assert "Hash of the data" in page
    assert numbers["details"]["Hash of the data"] in page
    assert "tests.cli.project.Net" in page


def test_the_page_has_the_history_of_the_run(runs, run, tmp_path):
    path = tmp_path / "report.html"
    assert run("measure", runs / "small.ckpt", *NET, *DATA, "-o", path)[0] == 0
    assert "The run, epoch by epoch" in path.read_text()


def test_a_page_and_a_table_of_a_comparison(runs, run, tmp_path):
    path, other = tmp_path / "report.html", tmp_path / "[red]wide.ckpt"
    shutil.copy(runs / "wide.ckpt", other)
    code, out, _ = run("compare", other, runs / "small.ckpt", *NET, *DATA, "-o", path)
    assert code == 0
    assert "small" in out
    assert "times [red]wide" in out
    page = path.read_text()
    assert "Comparison of [red]wide and small" in page
    assert "Checkpoint small" in page


def test_notes_are_on_stderr(runs, run, tmp_path):
    path = tmp_path / "report.html"
    words = ["--model", "tests.cli.project.Lenient", *DATA, "-o", path]
    code, out, err = run("measure", runs / "small.ckpt", *words)
    assert code == 0
    assert "Note: " not in out
    note = f"'{runs / 'small.ckpt'}' does not contain scale: initial values are kept."
    assert note in " ".join(err.split())
    assert "does not contain scale: initial values are kept" in path.read_text()


def test_warnings_are_written(runs, numbers):
    found = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Warns", *DATA)
    assert found["notes"] == ["the images look odd"]


@pytest.mark.parametrize("code", [os.__file__, pytest.__file__, "<frozen importlib._bootstrap>"])
def test_warnings_of_libraries_are_no_notes(code):
    with _noted() as notes:
        warnings.warn_explicit("theirs", DeprecationWarning, code, 1)
        warnings.warn_explicit("ours", UserWarning, str(project.__file__), 1)
    assert notes == ["ours"]


def test_ctrl_c_is_neither_done_nor_a_mistake(runs, run, monkeypatch):
    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(project.Net, "validation_step", interrupt)
    code, _, err = run("measure", runs / "small.ckpt", *NET, *DATA)
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert (code, err) == (130, "lightning-flatness: interrupted\n")


def test_in_a_job_of_several_tasks(runs, run, monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "sweep", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run("measure", runs / "small.ckpt", *NET, *DATA)[0] == 0


def test_without_jsonargparse_a_line_says_so(runs, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, _, err = run("measure", runs / "small.ckpt", *NET, *DATA)
    assert code == 1
    assert "pip install 'jsonargparse[signatures]'" in err


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in ABOUT)], ids=" ".join)
def test_help_is_short(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) < 130


@pytest.mark.slow
def test_help_imports_no_torch():
    code = (
        "import sys\nfrom lightning_flatness.cli.main import main\n"
        "try:\n    main(['measure', '--help'])\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.slow
def test_the_module_runs(cli_run, tmp_path):
    words = [sys.executable, "-m", "lightning_flatness", "measure", str(cli_run / "last.ckpt"), "-o", "report.html"]
    paths = ":".join([*filter(None, sys.path)])
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": paths, "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "net.2" in done.stdout
    assert (tmp_path / "report.html").exists()
