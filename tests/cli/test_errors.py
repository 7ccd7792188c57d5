"""What cannot be measured gets one line that names what is wrong and what to do; exit codes say which kind it is."""

import argparse
import os
import pickle
import shutil

import pytest
import torch

import lightning_flatness as lf
from tests.cli import project
from tests.cli.conftest import DATA
from tests.guarding import guards

NET = ["--model", "tests.cli.project.Net"]


def hugging_face(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def mixed(folder):
    folder.mkdir()
    for name in "model.safetensors", "last.ckpt":
        (folder / name).write_bytes(b"")


def pieces(folder):
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")


def truncated(path, of):
    path.write_bytes(of.read_bytes()[:-500])


def result(path):
    saved = lf.measure_flatness(torch.nn.Linear(2, 3), [torch.ones(4, 2)], layers="all").save(path.with_suffix(".npz"))
    shutil.move(saved, path)


FILES = {
    "no such file": (lambda path, runs: None, 1, ["There is no file"]),
    "folder": (lambda path, runs: path.mkdir(), 2, ["is a folder", "it has none"]),
    "folder of files": (lambda path, runs: shutil.copytree(runs, path), 2, ["is a folder", "such as", "net.pt"]),
    "hugging face": (lambda path, runs: hugging_face(path), 2, ["Hugging Face", "model.safetensors", "--model"]),
    "run with safetensors": (lambda path, runs: mixed(path), 2, ["is a folder: name a file", "last.ckpt"]),
    "in pieces": (lambda path, runs: pieces(path), 2, ["in several pieces", "consolidate_checkpoint"]),
    "truncated": (lambda path, runs: truncated(path, runs / "small.ckpt"), 2, ["cut off or damaged"]),
    "empty": (lambda path, runs: path.write_bytes(b""), 2, ["is empty"]),
    "result": (lambda path, runs: result(path), 2, ["no checkpoint, but a result", "lf.FlatnessReport.load"]),
    "text": (lambda path, runs: path.write_text("<html>404</html>"), 2, ["is not a checkpoint", "<html>"]),
    "lfs": (lambda path, runs: path.write_text("version https://git-lfs.github.com/spec/v1\n"), 2, ["git lfs pull"]),
    "list": (lambda path, runs: torch.save([torch.ones(2)], path), 2, ["holds a list"]),
    "no weights": (lambda path, runs: torch.save({"epoch": 3}, path), 2, ["holds 'epoch'", "state_dict()"]),
    "two sets": (lambda path, runs: torch.save({key: {"w": torch.ones(1)} for key in "ab"}, path), 2, ["several sets"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(runs, tmp_path, run, name):
    make, expected, phrases = FILES[name]
    path = tmp_path / "file.ckpt"
    make(path, runs)
    assert_one_line(run("measure", path, *NET, *DATA), expected, [str(path), *phrases])


def assert_one_line(outcome, expected, phrases):
    code, out, err = outcome
    assert code == expected, err
    assert out == ""
    assert err.startswith("lightning-flatness: ")
    assert err.count("\n") == 1
    assert len(err) < 650
    for phrase in phrases:
        assert phrase in err


def test_broken_safetensors(tmp_path, run):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    assert_one_line(run("measure", path, *NET, *DATA), 2, ["is not a checkpoint", "model.safetensors"])


PROJECT = "--model tests.cli.project"
IMAGES = "--data tests.cli.project.Images"
# The file, the options, the exit code, and phrases of the line.
COMMANDS = {
    "other class": (
        f"small.ckpt {PROJECT}.Plain {IMAGES}", 2, ["does not fit the Plain", "are missing", "begin with 'net.'"]
    ),
    "other width": (
        f"small.ckpt {PROJECT}.Net {IMAGES} --model.width 5", 2,
        ["shapes differ", "(2, 1, 3, 3) in the file", "(5, 1, 3, 3) in the model"],
    ),
    "no class": (f"small.ckpt {IMAGES}", 1, ["does not name the class of the model", "--model", "--config"]),
    "no data": (f"small.ckpt {PROJECT}.Net --data torch.nn.ReLU", 1, ["--data", "ReLU is no LightningDataModule"]),
    "data unknown": (f"plain.pt {PROJECT}.Plain", 1, ["does not name the class of the data", "--data"]),
    "no module": (f"small.ckpt --model nowhere.Net {IMAGES}", 1, ["no module 'nowhere'", "PYTHONPATH"]),
    "no attribute": (f"small.ckpt {PROJECT}.Nut {IMAGES}", 1, ["has no 'Nut'"]),
    "no path": (f"small.ckpt --model Net {IMAGES}", 1, ["'Net'", "package.Net"]),
    "of the script": (f"small.ckpt --model __main__.Net {IMAGES}", 1, ["in the script", "--model", "script.Net"]),
    "no network": (f"small.ckpt {PROJECT}.Images {IMAGES}", 1, ["makes a Images, not a module"]),
    "wrong type": (f"small.ckpt {PROJECT}.Net {IMAGES} --model.width x", 1, ["--model.width: Expected a int"]),
    "unknown argument": (f"small.ckpt {PROJECT}.Net {IMAGES} --model.wid 3", 1, ["there is no argument 'wid'"]),
    "missing argument": (
        f"small.ckpt --model torch.nn.Linear {IMAGES}", 1, ["--model.in_features VALUE, --model.out_features VALUE"]
    ),
    "without value": (f"small.ckpt {PROJECT}.Net {IMAGES} --model.width", 1, ["--model.width needs a value"]),
    "option in place of a value": (
        f"small.ckpt {PROJECT}.Net {IMAGES} --model.width --layers all", 1, ["--model.width needs a value"]
    ),
    "no config": (f"small.ckpt --config nothing.yaml {IMAGES}", 1, ["There is no file 'nothing.yaml'"]),
    "unknown option": ("small.ckpt --lyers all", 1, ["--lyers", "--help"]),
    "bad number": ("small.ckpt --max-samples -1", 1, ["--max-samples"]),
    "no number": ("small.ckpt --max-samples 0", 1, ["--max-samples", "whole number"]),
    "bad output": ("small.ckpt -o report.pdf", 1, [".html", ".npz"]),
    "output folder": ("small.ckpt -o {folder}", 1, ["is a folder"]),
    "no validation data": (
        f"small.ckpt {PROJECT}.Net --data tests.cli.project.OnlyTraining", 2,
        ["OnlyTraining.val_dataloader() returns None", "Give --split train"],
    ),
    "output nowhere": ("small.ckpt -o no/where/a.html", 1, ["no folder 'no/where'"]),
    "bad device": (f"small.ckpt {PROJECT}.Net {IMAGES} --device abacus", 1, ["--device abacus"]),
    "no layer": (f"small.ckpt {PROJECT}.Net {IMAGES} --layers conv9", 2, ["conv9", "net.2", "give --layers NAMES."]),
    "no loss": (f"small.ckpt {PROJECT}.Net {IMAGES} --loss hinge", 1, ["--loss hinge", "cross_entropy"]),
    "no network there": (f"small.ckpt {PROJECT}.Net {IMAGES} --network body", 2, ["body", "'net'", "--network"]),
    "needs its run": (
        f"small.ckpt {PROJECT}.NeedsItsRun {IMAGES}", 2,
        ["validation step of NeedsItsRun", "AttributeError", "--inputs batch"],
    ),
    "needs its run and a number": (
        f"small.ckpt {PROJECT}.NumberedNeedsItsRun {IMAGES}", 2,
        ["validation step of NumberedNeedsItsRun", "AttributeError", "--inputs batch"],
    ),
    "skips a batch": (
        f"small.ckpt {PROJECT}.SkipsTheFirst {IMAGES}", 2, ["did not call it before", "--inputs batch"],
    ),
    "no step": (f"small.ckpt {PROJECT}.WithoutStep {IMAGES} --inputs step", 1, ["has no validation step"]),
    "several files": ("small.ckpt wide.ckpt", 1, ["measure takes one checkpoint, and 2", "compare takes several"]),
    "data of a function": (
        f"small.ckpt {PROJECT}.Net --data tests.cli.project.pairs", 1,
        ["--data: tuple is no LightningDataModule", "a LightningDataModule class, or of a function that returns"],
    ),
    "no such targets": (
        f"small.ckpt {PROJECT}.Net {IMAGES} --targets label", 2,
        ["--targets label: a batch has no tensor with this key", "position. The batch is a list of length 2"],
    ),
    "more than inputs": (
        f"small.ckpt {PROJECT}.Net {PROJECT.replace('model', 'data')}.Three --targets label --inputs batch", 2,
        ["--targets label: without a validation step, a batch must have one entry", "'a', 'b', 'label'"],
    ),
    "not exact": (f"small.ckpt {PROJECT}.Net {IMAGES} --layers net.0 --strict", 2, ["net.0"]),
}  # fmt: skip


@guards("cli/steps.py", 'hooks <= {"visit", "validation_step"}', 'hooks <= {"visit"}', ids="needs its run and a number")
@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_that_are_wrong(runs, run, tmp_path, name):
    line, expected, phrases = COMMANDS[name]
    (tmp_path / "folder.json").mkdir()
    file, *words = line.replace("{folder}", str(tmp_path / "folder.json")).split()
    assert_one_line(run("measure", runs / file, *words), expected, phrases)


def test_a_comparison_of_batches_without_targets(runs, run):
    words = ["--model", "tests.cli.project.OfSpecies", "--data", "tests.cli.project.Species", "--layers", "net.0"]
    files = runs / "small.ckpt", runs / "small.ckpt"
    code, out, err = run("compare", *files, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Give --no-train-loss to compare the networks without" in err
    assert "--targets KEY names the entry" in err
    assert err.count("expected (inputs, targets)") == 1


@pytest.mark.parametrize("span", ["nan", "inf", "-1", "0", "wide"])
def test_spans_that_cannot_be(run, span):
    assert_one_line(run("landscape", "small.ckpt", "--span", span), 1, ["--span", span])


@pytest.mark.parametrize("words", [[], ["measure"], ["compare", "a.ckpt"], ["mesure", "a.ckpt"]])
def test_incomplete_command_lines(run, words):
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (1, "", 1)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@guards("cli/checkpoints.py", "weights_only=not trust", "weights_only=False")
def test_objects_are_unpickled_only_if_trusted(runs, run, tmp_path):
    path, folder = tmp_path / "bad.ckpt", tmp_path / "made by the checkpoint"
    content = torch.load(runs / "small.ckpt", weights_only=True)
    torch.save({**content, "hyper_parameters": {"width": 2, "note": RunsCode(folder)}}, path)
    assert_one_line(run("measure", path, *NET, *DATA), 2, ["mkdir", "--trust"])
    assert not folder.exists()
    assert run("measure", path, *NET, *DATA, "--trust")[0] == 0
    assert folder.exists()


def test_harmless_hyper_parameters_need_no_trust(runs, run, tmp_path):
    path = tmp_path / "harmless.ckpt"
    content = torch.load(runs / "small.ckpt", weights_only=True)
    harmless = {"width": 2, "folder": tmp_path, "more": argparse.Namespace(lr=0.1)}
    torch.save({**content, "hyper_parameters": harmless}, path)
    assert run("measure", path, *NET, *DATA)[0] == 0


def test_old_pickles_are_not_run_either(run, tmp_path):
    path, folder = tmp_path / "bad.pt", tmp_path / "made by the file"
    path.write_bytes(pickle.dumps(RunsCode(folder)))
    assert run("measure", path, *NET, *DATA)[0] == 2
    assert not folder.exists()


def test_a_whole_module_is_not_weights(run, tmp_path):
    path = tmp_path / "whole.pt"
    torch.save(project.Plain(), path)
    assert_one_line(run("measure", path, *NET, *DATA), 2, ["--trust", "tests.cli.project.Plain"])
    assert_one_line(run("measure", path, *NET, *DATA, "--trust"), 2, ["whole module", "state_dict()"])


def test_debug_shows_where(run):
    code, _, err = run("measure", "nothing.ckpt", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_unexpected_errors_are_one_line_too(runs, run, monkeypatch):
    monkeypatch.setattr(project.Images, "val_dataloader", lambda self: [project.Images()])
    assert_one_line(run("measure", runs / "small.ckpt", *NET, *DATA), 2, [])


def test_an_argument_of_the_config_that_is_unknown(runs, run, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {class_path: tests.cli.project.Net, init_args: {depth: 3}}")
    words = ["measure", runs / "small.ckpt", "--config", path, *DATA]
    assert_one_line(run(*words), 1, ["tests.cli.project.Net", "depth"])
    path.write_text("model: {width: 3}")
    assert_one_line(run(*words), 1, ["Neither", "nor --config", "fixed", "--model package.Class"])
    path.write_text("- 1")
    assert_one_line(run(*words), 1, ["no config of a LightningCLI run"])
    path.write_text("a: b: c")
    assert_one_line(run(*words), 1, ["not YAML"])


@guards("cli/splits.py", "{REMEDIES[name]}", "")
@guards("cli/splits.py", "else REMEDIES[name])", 'else "")')
@pytest.mark.parametrize(("data", "expected"), [("OnlyValidation", 2), ("StreamedTraining", 1)])
def test_a_comparison_whose_training_data_cannot_be_read(runs, run, data, expected):
    words = ["--model", "tests.cli.project.Net", "--data", f"tests.cli.project.{data}"]
    assert_one_line(run("compare", runs / "small.ckpt", runs / "small.ckpt", *words), expected, ["--no-train-loss"])
    assert run("compare", runs / "small.ckpt", runs / "small.ckpt", *words, "--no-train-loss")[0] == 0
