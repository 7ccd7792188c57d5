"""Build the model and the data of a training run from the user's classes and their arguments.

The classes and arguments are named on the command line, in a checkpoint or in a config file.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from lightning_flatness.cli.arguments import Command, UsageError
from lightning_flatness.cli.checkpoints import Checkpoint
from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.texts import named

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
REMEDIES = {
    "model": "give --model package.Class (its arguments as --model.ARG VALUE)",
    "data": "give --data package.DataModule (its arguments as --data.ARG VALUE)",
}


def read_config(path: Path | None) -> dict[str, Any]:
    """Read the config file of a LightningCLI run; return an empty dict if ``path`` is None.

    The file is either the ``config.yaml`` that LightningCLI saves, or a file whose entry ``fit`` has that content.
    """
    if path is None:
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no file '{path}'.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config '{path}' is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(config, dict):
        raise UsageError(
            f"--config '{path}' is no config of a LightningCLI run. Give the config.yaml that the run saved."
        )
    of_fit = config.get("fit")
    return of_fit if isinstance(of_fit, dict) and "model" not in config else config


class Built(NamedTuple):
    """A model or a data module, with the import path of its class and a note for the user (empty if there is none)."""

    value: Any
    class_path: str
    note: str


def build(kind: str, command: Command, config: Mapping[str, Any], checkpoint: Checkpoint) -> Built:
    """Build the ``"model"`` or the ``"data"`` of a run.

    The class is looked up on the command line first, then in the config, then in the checkpoint. The arguments from
    these three sources are merged. Where they disagree, the command line wins over the checkpoint, and the checkpoint
    over the config. Arguments that the checkpoint or the config has for another class are ignored. A note names the
    hyper-parameters in the checkpoint that the class does not take.

    Raise a :class:`UsageError` if no source has the class, or an argument without a default.
    """
    configured = _configured(kind, config)
    class_path = class_of(kind, command, config, checkpoint)
    if not class_path:
        raise UsageError(_nobody_says(kind, command, checkpoint))
    source = f"'{checkpoint.path}'"
    if getattr(command, kind) or configured.get("class_path"):
        source = f"--{kind}" if getattr(command, kind) else f"--config '{command.config}'"
    made = imported(class_path, source)
    names, takes_all = _parameters(made)
    stored = checkpoint.stored(kind, names)
    own, of_a_config = stored.pop("_class_path", None), stored.pop("_instantiator", None) is not None
    if own and own.rpartition(".")[2] != class_path.rpartition(".")[2]:
        # The stored arguments belong to another class. Names of modules are not compared, because a class of the
        # training script (module __main__) may now be imported from another module.
        stored = {}
    of_config = configured.get("init_args", {}) if "class_path" in configured else configured
    if configured.get("class_path") not in (None, class_path):
        of_config = {}  # the arguments in the config belong to another class
    taken = {name: value for name, value in stored.items() if takes_all or name in names}
    words = command.arguments[kind]
    given = _of_words(words)
    # As Lightning does, give values of the run to the class as they are. Parsing would change some, e.g. "null".
    objects = {k: v for k, v in taken.items() if k not in given and not (of_a_config and _is_of_a_config(v))}
    texts = {k: v for k, v in taken.items() if _is_of_a_config(v)}
    defaults = {k: v for k, v in {**(of_config or {}), **texts}.items() if k not in objects}
    note = _note(checkpoint, made, class_path, [name for name in stored if name not in taken])
    missing = [name for name, is_required in names.items() if is_required and name not in {*taken, *defaults, *given}]
    if missing:
        raise UsageError(f"--{kind} {class_path}: {_needs(f'{kind}.{name}' for name in missing)} {note}".strip())
    return Built(made_of(made, kind, class_path, defaults, objects, words), class_path, note)


def class_of(kind: str, command: Command, config: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Return the import path of the class of the ``"model"`` or the ``"data"``, or an empty string if it is unknown.

    The path comes from the command line, the config or the checkpoint, in this order.
    """
    own = checkpoint.stored(kind).get("_class_path")
    return getattr(command, kind) or _configured(kind, config).get("class_path") or own or ""


def _configured(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    entry = config.get(kind) or {}
    return entry if isinstance(entry, dict) else {"class_path": entry}


def _nobody_says(kind: str, command: Command, checkpoint: Checkpoint) -> str:
    if command.config:
        nobody = f"Neither '{checkpoint.path}' nor --config '{command.config}' names"
        return f"{nobody} the class of the {kind} (LightningCLI saves no class fixed in the code): {REMEDIES[kind]}."
    return f"'{checkpoint.path}' does not name the class of the {kind}: {REMEDIES[kind]}, or the --config of the run."


def imported(path: str, source: str) -> Any:
    """Import and return the class or function at ``path``; error messages name ``source``, which gave the path."""
    module_name, _, name = path.rpartition(".")
    if module_name == "__main__":
        raise UsageError(
            f"{source} names {path}, which was defined in the script that was run. Give its import path instead, with "
            f"--model, --data or --loss: if the script is script.py, script.{name}."
        )
    if not module_name:
        raise UsageError(f"{source} names '{path}', which is not an import path such as package.{path or 'Class'}.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            problem = f"there is no module '{error.name}'. Run in the folder that contains it, or set PYTHONPATH"
        else:
            problem = f"importing '{module_name}' fails with {type(error).__name__}: {error}"
        raise UsageError(f"{source} names {path}, but {problem}.") from error
    if not hasattr(module, name):
        raise UsageError(f"{source} names {path}, but the module '{module_name}' has no '{name}'.")
    return getattr(module, name)


def made_of(
    made: Any,
    kind: str,
    name: str,
    defaults: Mapping[str, Any],
    objects: Mapping[str, Any],
    words: Sequence[str],
) -> Any:
    """Call the class or function ``made``, and return the result.

    As in LightningCLI, the type hints of ``made`` decide how ``defaults`` and ``words`` are parsed.

    Args:
        made: the class or function.
        kind: ``"model"`` or ``"data"``, the prefix of the options in ``words``.
        name: import path of ``made``, for error messages.
        defaults: values of arguments in the form that they have in a config file.
        objects: values of other arguments, which are passed to ``made`` without parsing.
        words: options such as ``--model.width=64``, which override ``defaults``.
    """
    try:
        from jsonargparse import ArgumentParser, Namespace
    except ModuleNotFoundError as error:
        raise UsageError("The command line needs jsonargparse: pip install 'jsonargparse[signatures]'") from error
    if not callable(made):
        raise UsageError(f"--{kind} {name} is a {type(made).__name__}, not a class or function.")

    def parser_without(skip: set[str]) -> tuple[ArgumentParser, set[str]]:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        options: dict[str, Any] = {"fail_untyped": False, "skip": skip}
        if inspect.isclass(made):
            return parser, _of_words(parser.add_class_arguments(made, kind, instantiate=False, **options))
        return parser, _of_words(parser.add_function_arguments(made, kind, **options))

    try:
        parser, added = parser_without(set(objects))
        if unknown := [key for key in defaults if key not in added]:
            raise UsageError(f"there is no argument '{unknown[0]}'.")
        # What nobody gives is left to the class, which fills in its own default or misses the argument. jsonargparse
        # would fill in None if there is neither default nor type, and would build a dataclass from other defaults.
        # But it has to build lazy instances, which are Namespaces with a class_path, also as fields of a dataclass.
        of_words = _of_words(words)
        own = vars(parser.get_defaults().get(kind, Namespace()))
        nested = {key: value for key, value in own.items() if isinstance(value, Namespace)}
        lazy = {key for key, value in nested.items() if "class_path" in ".".join(value.keys()).split(".")}
        values = {key: value for key, value in own.items() if key in {*defaults, *of_words, *lazy}}
        parser, _ = parser_without({*objects, *(k for k, v in own.items() if v is not None and k not in values)})
        # Options may give a part of what the config gives. jsonargparse merges the two if both are options.
        both = {k: v for k, v in defaults.items() if k in of_words and isinstance(v, (Mapping, list, tuple))}
        texts = [f"--{kind}.{key}={json.dumps(value, default=_as_text)}" for key, value in both.items()]
        if of_config := {key: value for key, value in defaults.items() if key not in both}:
            its_parser, _ = parser_without({*objects, *(added - set(of_config))})
            its_start = Namespace({kind: Namespace({k: v for k, v in nested.items() if k in of_config})})
            values |= vars(its_parser.parse_object({kind: of_config}, its_start, defaults=False)[kind])
        start = Namespace({kind: Namespace(values)})
        parsed = parser.parse_args([*texts, *words], namespace=start, defaults=False)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        arguments = getattr(instantiate(parsed), kind, argparse.Namespace())  # no entry if there are no arguments
        return made(**vars(arguments), **objects)
    except Exception as error:
        raise UsageError(f"--{kind} {name}: {_problem(error, kind)}") from error


def _parameters(made: Any) -> tuple[dict[str, bool], bool]:
    """Return the names of the arguments of a class or function, and whether it takes arguments of any name.

    The first value maps every name to whether the argument is required.
    """
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):
        return {}, True
    required = {one.name: one.default is one.empty for one in parameters if one.kind in NAMED}
    return required, any(one.kind is one.VAR_KEYWORD for one in parameters)


def _of_words(words: Iterable[str]) -> set[str]:
    """Return the names of the arguments that options set, like ``--model.width=64`` or ``--model.widths+=64``."""
    return {re.split(r"[.+=]", word)[1] for word in words}


def _as_text(value: Any) -> Any:
    """Return a value that JSON does not know, in the form that it has in a config file."""
    if isinstance(value, set):
        return list(value)
    return value.name if isinstance(value, Enum) else str(value)


def _is_of_a_config(value: Any) -> bool:
    """Return whether a value has a type that a config file can express, such as text, numbers and lists of these."""
    if isinstance(value, Mapping):
        return all(map(_is_of_a_config, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_of_a_config, value))
    return value is None or isinstance(value, (str, int, float, Path, Enum))


def _note(checkpoint: Checkpoint, made: Any, class_path: str, unused: Sequence[str]) -> str:
    """Return a note on those ``unused`` hyper-parameters that no base class takes; ``""`` if there are none."""
    bases = inspect.getmro(made) if inspect.isclass(made) else ()
    of_bases = set().union(*(_parameters(base)[0] for base in bases))
    unknown = [name for name in unused if name not in of_bases]
    if not unknown:
        return ""
    return (
        f"'{checkpoint.path}' has hyper-parameters that are no arguments of {class_path}: {named(unknown)}. "
        "They are not used."
    )


def _needs(names: Iterable[str]) -> str:
    return f"it needs {', '.join(f'--{name} VALUE' for name in names)}."


def _problem(error: Exception, kind: str) -> str:
    """Return one line about an error of jsonargparse, or of the class or function that was called."""
    text = " ".join(str(error).split())
    text = re.sub(rf'Parser key "{kind}\.([\w.]+)":', rf"--{kind}.\1:", text)
    text = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", text)
    if needed := re.search(r"arguments are required: (.*)", text):
        return _needs(needed[1].split(", "))
    if unknown := re.search(r"nrecognized arguments?: --(\S+)", text):
        return f"there is no argument '{unknown[1].partition('=')[0].removeprefix(f'{kind}.')}'."
    if type(error).__name__ in ("ArgumentError", "ArgumentTypeError"):
        return text[:300]
    return text if isinstance(error, FlatnessError) else f"calling it fails with {type(error).__name__}: {text[:300]}"
