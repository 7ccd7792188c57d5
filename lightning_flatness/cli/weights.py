"""Load the weights of a checkpoint into a model, or explain why they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_flatness.cli.checkpoints import Checkpoint
from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.texts import named, number_of


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Load the weights of a checkpoint into a model, and return a note that names missing weights.

    As in Lightning, weights may be missing only if the model's ``strict_loading`` is False. The note is empty if none
    is missing.

    Raises:
        FlatnessError: names or shapes of the weights differ from those of the model.
    """
    before_loading = getattr(model, "on_load_checkpoint", None)
    state = checkpoint.state
    if checkpoint.content and callable(before_loading):
        content = dict(checkpoint.content)
        before_loading(content)
        state = content["state_dict"]
    strict = bool(getattr(model, "strict_loading", True))
    try:
        keys = model.load_state_dict(state, strict=strict)
    except (RuntimeError, KeyError) as error:
        message = _misfit(model, checkpoint.path, state) or f"'{checkpoint.path}': {error}"
        raise FlatnessError(message) from error
    missing = list(keys.missing_keys)
    return f"'{checkpoint.path}' does not contain {named(missing)}: initial values are kept." if missing else ""


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
        f"{remedy}{_prefix_hint(missing, unknown)}"
    )


def _prefix_hint(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Return a hint if the names in the file are the model's names with a prefix; otherwise an empty string."""
    for name in unknown:
        prefix = next((name[: -len(own)] for own in missing if name.endswith(f".{own}")), "")
        if prefix and all(other.startswith(prefix) for other in unknown):
            return f" The others begin with '{prefix}': the file may hold a larger module that contains this model."
    return ""
