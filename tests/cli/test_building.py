"""Networks are built as Lightning builds them: with the hyper-parameters of the checkpoint, as they were stored."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jsonargparse import lazy_instance
from torch import nn

import lightning_flatness as lf
from lightning_flatness.cli.arguments import UsageError, parse
from lightning_flatness.cli.building import build
from lightning_flatness.cli.checkpoints import Checkpoint
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


class Untyped(nn.Module):
    def __init__(self, pool, factor=1):
        super().__init__()
        self.given = pool, factor


class Derived(Untyped):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class Optional(nn.Module):
    def __init__(self, pool: str | None):
        super().__init__()


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.given = inner.given


@dataclass
class Config:
    pool: str = "avg"
    factor: int = 1


class OfConfig(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.given = config.pool, config.factor


def built(kind, *words, stored=None, init_args=None):
    path = f"{__name__}.{kind.__name__}"
    checkpoint = Checkpoint(Path("run.ckpt"), {}, "", {"hyper_parameters": stored or {}})
    config = {"model": {"class_path": path, "init_args": init_args}} if init_args else {}
    return build("model", parse(["measure", "run.ckpt", "--model", path, *words]), config, checkpoint).value


REQUIRED = {
    "no type": (Untyped, [], r"Untyped: it needs --model\.pool VALUE\.$"),
    "optional type": (Optional, [], r"it needs --model\.pool VALUE"),
    "dataclass": (OfConfig, [], r"it needs --model\.config VALUE\. .*no arguments of .*OfConfig: pool"),
    "of a base class": (Derived, [], "missing 1 required positional argument: 'pool'"),
    "of an argument": (Around, [f"--model.inner={__name__}.Untyped"], "missing 1 required positional argument: 'pool'"),
}


@guards("cli/building.py", "left_out = added - given - has_default", "left_out = set()", ids="of a base class")
@guards("cli/building.py", 'parsed[f"{kind}.{key}"] = bare[f"{kind}.{key}"]', "pass", ids="of an argument")
@pytest.mark.parametrize(("kind", "words", "message"), REQUIRED.values(), ids=REQUIRED)
def test_a_required_argument_that_nobody_gives_is_not_filled_in(kind, words, message):
    with pytest.raises(UsageError, match=message):
        built(kind, *words, stored={"pool": "max"} if kind is OfConfig else None)


GIVEN = {
    "in words": (Untyped, ["--model.pool=null"], {}, (None, 1)),
    "in a config": (Untyped, ["--model.factor=2"], {"pool": None}, (None, 2)),
    "of a base class": (Derived, ["--model.pool=max"], {}, ("max", 1)),
    "of an argument, in both": (
        Around,
        ["--model.inner.init_args.factor=2"],
        {"inner": {"class_path": f"{__name__}.Untyped", "init_args": {"pool": None}}},
        (None, 2),
    ),
    "a field": (OfConfig, ["--model.config.factor=2"], {"config": {"pool": "max"}}, ("max", 2)),
}


@pytest.mark.parametrize(("kind", "words", "init_args", "expected"), GIVEN.values(), ids=GIVEN)
def test_required_arguments_that_are_given(kind, words, init_args, expected):
    assert built(kind, *words, init_args=init_args).given == expected


class Inner(nn.Module):
    def __init__(self, pool="max", factor=1):
        super().__init__()
        self.given = pool, factor


class WithDefaults(nn.Module):
    """Its defaults differ from those of the classes that they belong to."""

    def __init__(
        self,
        config: Config = Config("max", 5),  # noqa: B008
        inner: nn.Module = lazy_instance(Inner, factor=7),  # noqa: B008
        options: dict = {"a": 1, "b": 2},  # noqa: B006
        sizes: list[int] = [1, 2],  # noqa: B006
        text: str = 3,
    ):
        super().__init__()
        self.given = config.pool, config.factor, *inner.given, *options.values(), *sizes, text


@guards("cli/building.py", "parsed, bare = parse(True)", "parsed, bare = parse(False)", ids="of a dataclass")
@guards("cli/building.py", 'if not hasattr(type(own[key]), "lazy_get_init_args")', "", ids="none")
@guards("cli/building.py", "if own[key] is not None}", "if False}", ids=("of a dataclass", "of an instance"))
@pytest.mark.parametrize(
    ("words", "init_args", "expected"),
    [
        ([], {}, ("max", 5, "max", 7, 1, 2, 1, 2, 3)),
        (["--model.config.pool=min"], {}, ("min", 5, "max", 7, 1, 2, 1, 2, 3)),
        ([], {"config": {"factor": 6}}, ("max", 6, "max", 7, 1, 2, 1, 2, 3)),
        (["--model.inner.pool=min"], {}, ("max", 5, "min", 7, 1, 2, 1, 2, 3)),
        (["--model.options.b=3"], {}, ("max", 5, "max", 7, 1, "3", 1, 2, 3)),
        (["--model.sizes+=3"], {}, ("max", 5, "max", 7, 1, 2, 1, 2, 3, 3)),
        (["--model.sizes+=3"], {"sizes": [7]}, ("max", 5, "max", 7, 1, 2, 7, 3, 3)),
    ],
    ids=["none", "of a dataclass", "of a config", "of an instance", "of a dict", "of a list", "of a list in a config"],
)
def test_defaults_of_the_class_stay(words, init_args, expected):
    assert built(WithDefaults, *words, init_args=init_args).given == expected
