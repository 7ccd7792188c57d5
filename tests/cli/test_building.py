"""Networks are built as Lightning builds them: with the hyper-parameters of the checkpoint, as they were stored."""

from dataclasses import dataclass, field
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


@guards("cli/building.py", "namespace=start, defaults=False)", "namespace=start)")
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


@dataclass
class Outer:
    inner: Config = field(default_factory=lambda: Config("max"))
    steps: int | None = 1


@dataclass
class Wider(Outer):
    width: int = 1


class Typed(nn.Module):
    def __init__(self, pool: str = "avg", factor: int = 1):
        super().__init__()
        self.given = pool, factor


class WithDefaults(nn.Module):
    def __init__(
        self,
        outer: Outer = Wider(Config("min", 4), None, 2),  # noqa: B008
        lazy: nn.Module = lazy_instance(Typed, factor=5),  # noqa: B008
        options: dict = {"a": 1, "b": 2},  # noqa: B006
        sizes: list[int] = [1, 2],  # noqa: B006
        optional: Config | None = None,
        or_none: Config | None = Config("min", 4),  # noqa: B008
        text: str = 3,
    ):
        super().__init__()
        self.given = {"outer": outer, "lazy": lazy.given, "options": options, "sizes": sizes, "text": text}
        self.given |= {"optional": optional, "or_none": or_none}


DEFAULTS = {
    "outer": Wider(Config("min", 4), None, 2),
    "lazy": ("avg", 5),
    "options": {"a": 1, "b": 2},
    "sizes": [1, 2],
    "optional": None,
    "or_none": Config("min", 4),
    "text": 3,
}
FACTOR = {"inner": {"factor": 7}}
LAZY = {"class_path": f"{__name__}.Typed", "init_args": {"pool": "max"}}
IN_PART = {
    "nothing": ([], {}, {}),
    "another argument": ([], {"text": "a"}, {"text": "a"}),
    "field": (["--model.outer.steps=2"], {}, {"outer": Outer(Config("min", 4), 2)}),
    "field of a field": (["--model.outer.inner.pool=max"], {}, {"outer": Outer(Config("max", 4), None)}),
    "field in a config": ([], {"outer": FACTOR}, {"outer": Outer(Config("min", 7), None)}),
    "field in both": (["--model.outer.steps=2"], {"outer": FACTOR}, {"outer": Outer(Config("min", 7), 2)}),
    "fields at once": (["--model.outer={steps: 2}"], {"outer": FACTOR}, {"outer": Outer(Config("min", 7), 2)}),
    "lazy": (["--model.lazy.pool=max"], {}, {"lazy": ("max", 5)}),
    "lazy in a config": ([], {"lazy": LAZY}, {"lazy": ("max", 5)}),
    "lazy in both": (["--model.lazy.factor=6"], {"lazy": LAZY}, {"lazy": ("max", 6)}),
    "key": (["--model.options.a=5"], {}, {"options": {"a": "5", "b": 2}}),
    "key in both": (["--model.options.a=5"], {"options": {"c": 3}}, {"options": {"a": "5", "c": 3}}),
    "list": (["--model.sizes+=3"], {}, {"sizes": [1, 2, 3]}),
    "list in both": (["--model.sizes+=3"], {"sizes": [7]}, {"sizes": [7, 3]}),
    "optional": (["--model.optional.factor=6"], {}, {"optional": Config("avg", 6)}),
    "optional in both": (["--model.optional.factor=6"], {"optional": {"pool": "max"}}, {"optional": Config("max", 6)}),
    "or none": (["--model.or_none.factor=6"], {}, {"or_none": Config("min", 6)}),
    "or none in both": (["--model.or_none.factor=6"], {"or_none": {"pool": "max"}}, {"or_none": Config("max", 6)}),
}


@guards("cli/building.py", "v is not None and k not in values", "False", ids="nothing")
@guards("cli/building.py", "*of_words, *lazy}", "*of_words}", ids="nothing")
@guards("cli/building.py", "namespace=start, defaults=False)", "defaults=False)", ids=["field", "lazy", "key", "list"])
@guards(
    "cli/building.py", "its_start, defaults=False)", "defaults=False)", ids=["field in a config", "lazy in a config"]
)
@guards("cli/building.py", "isinstance(v, (Mapping, list, tuple))", "False", ids=["optional in both", "fields at once"])
@pytest.mark.parametrize(("words", "init_args", "expected"), IN_PART.values(), ids=IN_PART)
def test_defaults_stay_where_arguments_are_given_in_part(words, init_args, expected):
    assert built(WithDefaults, *words, init_args=init_args).given == DEFAULTS | expected


class Scaled(project.Images):
    def __init__(self, scale: Outer = Outer(Config(factor=10))):  # noqa: B008
        super().__init__()
        self.factor = scale.inner.factor

    def setup(self, stage):
        super().setup(stage)
        self.val = [(self.factor * inputs, label) for inputs, label in self.val]


def test_numbers_are_those_of_a_default_in_the_signature(numbers, runs):
    found = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Net", "--data", f"{__name__}.Scaled")
    network = project.Net.load_from_checkpoint(runs / "small.ckpt")
    batches = [(10 * inputs, labels) for inputs, labels in images()]
    assert found["hessian_trace"] == pytest.approx(lf.measure_flatness(network, batches).hessian_trace, rel=1e-9)
