"""Load the weights of a checkpoint into a model, or explain why they do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_flatness.cli.checkpoints import Checkpoint
from lightning_flatness.errors import FlatnessError

MOST_NAMES = 3


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Load the weights of a checkpoint into a model, and return a note that names missing weights.

    As in Lightning, weights may be missing only if the model's ``strict_loading`` is False. The note is empty if none
    is missing.

    Raises:
        FlatnessError: names or shapes of the weights differ from those of the model.
    """
    before_loading = getattr(model, "on_load_checkpoint", None)
    if checkpoint.content and callable(before_loading):
        before_loading(dict(checkpoint.content))
    strict = bool(getattr(model, "strict_loading", True))
    try:
        keys = model.load_state_dict(dict(checkpoint.state), strict=strict)
    except (RuntimeError, KeyError) as error:
        raise FlatnessError(_misfit(model, checkpoint) or f"'{checkpoint.path}': {error}") from error
    missing = list(keys.missing_keys)
    return f"'{checkpoint.path}' does not contain {_some(missing)}: initial values are kept." if missing else ""


def _misfit(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Return a message on how the weights in a file differ from the model's in name or shape; empty if they agree."""
    wanted, given = model.state_dict(), checkpoint.state
    missing, unknown = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    shapes = {name: (tuple(given[name].shape), tuple(wanted[name].shape)) for name in wanted if name in given}
    others = [f"{name} ({file} in the file, {own} in the model)" for name, (file, own) in shapes.items() if file != own]
    parts = [
        f"{len(missing)} of {len(wanted)} weights are missing: {_some(missing)}" if missing else "",
        f"the file has {len(unknown)} others: {_some(unknown)}" if unknown else "",
        f"shapes differ: {_some(others)}" if others else "",
    ]
    if not any(parts):
        return ""
    remedy = "Give the class and the arguments of the trained model: --model CLASS --model.ARG VALUE."
    return (
        f"'{checkpoint.path}' does not fit the {type(model).__name__} that was built: "
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
