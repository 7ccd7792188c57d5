import json
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_flatness as lf
from lightning_flatness.cli.main import main
from tests.cli import project

DATA = ["--data", "tests.cli.project.Images"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of what a user's runs have left: checkpoints of two networks, one of a LightningCLI, weights alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    for name, model in {"small": project.Net(2), "wide": project.Net(3), "preparing": project.Preparing(2)}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = project.quiet_trainer(callbacks=[lf.FlatnessCallback(summary=False, figures=False)])
            trainer.fit(model, datamodule=project.Images())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    torch.save(project.Net(2).net.state_dict(), folder / "plain.pt")
    torch.save(project.Net(2).state_dict(), folder / "net.pt")
    return folder


@pytest.fixture(scope="session")
def cli_run(tmp_path_factory):
    """The folder of a run of a LightningCLI: ``config.yaml`` and ``last.ckpt``."""
    folder = tmp_path_factory.mktemp("cli_run")
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    arguments = {
        "seed_everything": 5,
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(folder), **quiet},
        "model": {"class_path": "tests.cli.project.Net", "init_args": {"width": 4}},
        "data": {"class_path": "tests.cli.project.Images", "init_args": {"size": 16}},
    }
    subclasses = {"subclass_mode_model": True, "subclass_mode_data": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(
            L.LightningModule, L.LightningDataModule, args={"fit": arguments, "subcommand": "fit"}, **subclasses
        )
    cli.trainer.save_checkpoint(folder / "last.ckpt")
    return folder


@pytest.fixture
def run(capsys, tmp_path):
    """Run a command line in this process; return its exit code, and what it has printed."""

    def run(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def numbers(run, tmp_path):
    """Run a command line, and return the numbers that it has written as JSON."""

    def numbers(*words):
        path = tmp_path / "numbers.json"
        code, out, err = run(*words, "-o", path, "--quiet")
        assert (code, out, err) == (0, "", "")
        return json.loads(path.read_text())

    return numbers
