"""Load the weights of a checkpoint into a model, or explain why they do not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_flatness.cli.checkpoints import Checkpoint
from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.names import plain_name
from lightning_flatness.results.texts import named, number_of

WRAPPED = "module."  # the prefix that DataParallel and DDP add


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Load the weights of a checkpoint into a model, and return a note on missing and renamed weights, or ``""``.

    As in Lightning, weights may be missing only if the model's ``strict_loading`` is False. Names may have the parts
    that DataParallel, DDP and ``torch.compile`` add.

    Raises:
        FlatnessError: names or shapes of the weights differ from those of the model.
    """
    before_loading = getattr(model, "on_load_checkpoint", None)
    state = checkpoint.state
    if checkpoint.content and callable(before_loading):
        content = dict(checkpoint.content)
        before_loading(content)
        state = content["state_dict"]
    state, renamed = _with_own_names(model, state)
    strict = bool(getattr(model, "strict_loading", True))
    try:
        keys = model.load_state_dict(state, strict=strict)
    except (RuntimeError, KeyError) as error:
        message = _misfit(model, checkpoint.path, state) or f"'{checkpoint.path}': {error}"
        raise FlatnessError(message) from error
    missing = list(keys.missing_keys)
    notes = [f"'{checkpoint.path}' does not contain {named(missing)}: initial values are kept."] * bool(missing)
    if renamed:
        given, own = renamed
        notes.append(
            f"The weights in '{checkpoint.path}' have other names: '{given}' is '{own}' in the {type(model).__name__}."
        )
    return " ".join(notes)


def _with_own_names(model: nn.Module, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, str] | None]:
    """Rename the weights in a state dict if their names differ from the model's only by the parts that wrappers add.

    Return the renamed state dict and, as an example for a note, the old and new name of one weight. If the names are
    the model's, or differ in another way, return the state dict as it is, and None.
    """
    own = {plain_name(name): name for name in model.state_dict()}
    if set(state) == set(own.values()):
        return state, None
    for prefix in ("", WRAPPED):
        names = {name: own.get(plain_name(name).removeprefix(prefix), "") for name in state}
        if sorted(names.values()) == sorted(own.values()):
            found = OrderedDict((names[name], value) for name, value in state.items())
            modules = {plain_name(name): name for name, _ in model.named_modules()}
            versions: Any = OrderedDict()
            for name, entry in getattr(state, "_metadata", {}).items():
                plain = f"{plain_name(name)}.".removeprefix(prefix).removesuffix(".")
                versions[modules.get(plain, plain)] = entry
            found._metadata = versions  # type: ignore[attr-defined]
            return found, next((pair for pair in names.items() if pair[0] != pair[1]), None)
    return state, None


def _misfit(model: nn.Module, path: Path, given: Mapping[str, Any]) -> str:
    """Return a message on how the weights in a file differ from the model's in name or shape; empty if they agree."""
    wanted = model.state_dict()
    missing, unknown = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    shapes = {name: (tuple(given[name].shape), tuple(wanted[name].shape)) for name in wanted if name in given}
    others = [f"{name} ({file} in the file, {own} in the model)" for name, (file, own) in shapes.items() if file != own]
    parts = [
        f"{len(missing)} of {len(wanted)} weights are missing: {named(missing)}" if missing else "",
        f"the file has {number_of(len(unknown), 'other weight')}: {named(unknown)}" if unknown else "",
        f"shapes differ: {named(others)}" if others else "",
    ]
    if not any(parts):
        return ""
    remedy = "Give the class and the arguments of the trained model: --model CLASS --model.ARG VALUE."
    return (
        f"'{path}' does not fit the {type(model).__name__} that was built: "
        f"{'; '.join(filter(None, parts))}. "
        f"{remedy}{_prefix_hint(missing, unknown)}{_text_hint(model, unknown)}"
    )


def _prefix_hint(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Return a hint if the names in the file are the model's names with a prefix; otherwise an empty string."""
    for name in unknown:
        prefix = next((name[: -len(own)] for own in missing if name.endswith(f".{own}")), "")
        if prefix and all(other.startswith(prefix) for other in unknown):
            return f" The others begin with '{prefix}': the file may hold a larger module that contains this model."
    return ""


def _text_hint(model: nn.Module, unknown: Sequence[str]) -> str:
    """Return a hint if an attribute of the model is a text where the file has weights; otherwise an empty string."""
    for name in dict.fromkeys(name.partition(".")[0] for name in unknown):
        text = getattr(model, name, None)
        if isinstance(text, str):
            remedy = f"If a class was meant, annotate the argument of the model, for example {name}: nn.Module."
            return f" Its '{name}' is the text '{text}', not a module. {remedy}"
    return ""
