"""Networks are built as Lightning builds them: with the hyper-parameters of the checkpoint, as they were stored."""

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from tests.cli import project
from tests.cli.conftest import DATA
from tests.guarding import guards

MODULES = {"net": project.layers(2), "criterion": nn.CrossEntropyLoss(), "kind": nn.Tanh}
STORED = {
    "of **kwargs": (project.Rest, {"width": 3, "act": "silu"}),
    "modules and classes": (project.GivenNet, MODULES),
    "text of a config": (project.OfText, {"act": "null"}),
    "text of a member": (project.OfText, {"act": "silu"}),
    "one argument": (project.OfOptions, {"options": {"width": 3, "lr": 0.1}}),
}


def saved(path, kind, arguments, **hyper_parameters):
    trainer = project.quiet_trainer()
    trainer.strategy.connect(kind(**arguments))
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], **hyper_parameters}}, path)
    return path


def options(kind):
    return ["--model", f"tests.cli.project.{kind.__name__}", *DATA, "--trust"]


@guards("cli/checkpoints.py", "{name: arguments} if name in names else arguments", "arguments", ids="one argument")
@pytest.mark.parametrize("name", STORED)
def test_the_network_is_that_of_lightning(numbers, tmp_path, name):
    kind, arguments = STORED[name]
    path = saved(tmp_path / "model.ckpt", kind, arguments)
    found = numbers("measure", path, *options(kind))
    built = kind.load_from_checkpoint(path, weights_only=False)
    assert found["hessian_trace"] == pytest.approx(lf.measure_flatness(built, images()).hessian_trace, rel=1e-12)


def images():
    return project.images().val_dataloader()


def test_the_command_line_overrides_stored_objects(run, tmp_path):
    path = saved(tmp_path / "model.ckpt", project.GivenNet, MODULES)
    code, _, err = run("measure", path, *options(project.GivenNet), "--model.kind", "torch.nn.SiLU")
    assert (code, err) == (0, "")


def test_hyper_parameters_that_are_no_arguments_are_noted(run, tmp_path):
    path = saved(tmp_path / "model.ckpt", project.Net, {}, depth=3)
    code, _, err = run("measure", path, *options(project.Net))
    assert code == 0
    note = "hyper-parameters that are no arguments of tests.cli.project.Net: depth. They are not used."
    assert note in " ".join(err.split())
