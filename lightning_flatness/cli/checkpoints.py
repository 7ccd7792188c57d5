"""Read checkpoints of Lightning and files with state dicts. Only ``trust=True`` unpickles arbitrary Python objects."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.cli.arguments import UsageError
from lightning_flatness.errors import FlatnessError

VERSION = "pytorch-lightning_version"
# Classes that are common in hyper-parameters and safe to unpickle, so that they need no ``trust``.
HARMLESS: list[Any] = [type(Path()), argparse.Namespace]
CONSOLIDATE = "python -m lightning.pytorch.utilities.consolidate_checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file (``state``). If Lightning wrote the file, ``content`` has all entries of the file."""

    path: Path
    state: Mapping[str, Any]
    digest: str  # SHA-256 of the file
    content: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""  # in a file that Lightning did not write, the key of the entry that holds the weights

    def stored(self, kind: str, names: Container[str] = ()) -> dict[str, Any]:
        """Return the hyper-parameters that Lightning saved for the ``"model"`` or the ``"data"``, or an empty dict.

        If the class takes them as one argument, whose name is in ``names``, the result has this argument alone.

        LightningCLI may add an entry ``"_class_path"``, the import path of the class. If there is an entry
        ``"_instantiator"``, LightningCLI has saved all entries in the form that they have in a config.
        """
        prefix = "datamodule_" if kind == "data" else ""
        stored = self.content.get(f"{prefix}hyper_parameters")
        arguments = dict(stored) if isinstance(stored, Mapping) else {}
        name = self.content.get(f"{prefix}hparams_name", "")
        return {name: arguments} if name in names else arguments

    @property
    def history(self) -> list[dict[str, Any]]:
        """The ``history`` of the first FlatnessCallback in the training run; an empty list if there was none."""
        states = self.content.get("callbacks")
        for key, state in (states if isinstance(states, Mapping) else {}).items():
            if str(key).startswith("FlatnessCallback") and isinstance(state, Mapping):
                return list(state.get("history", ()))
        return []


def read_checkpoint(path: Path, trust: bool = False) -> Checkpoint:
    """Read a checkpoint of Lightning or a file with a state dict.

    With ``trust``, all Python objects in the file are unpickled. This can run any code that the author of the file has
    put there.

    Raises:
        UsageError: the file does not exist, or the package ``safetensors`` is needed and not installed.
        FlatnessError: the file is not a checkpoint, is damaged, or holds Python objects and ``trust`` is False.
    """
    if not path.exists():
        raise UsageError(f"There is no file '{path}'.")
    if path.is_dir():
        raise FlatnessError(_about_folder(path))
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, trust)
    digest = _digest(path)
    if isinstance(content, nn.Module):
        raise FlatnessError(
            f"'{path}' holds a whole module, not its weights: write them with torch.save(module.state_dict(), path)."
        )
    if not isinstance(content, Mapping):
        raise FlatnessError(
            f"'{path}' holds a {type(content).__name__}, not a state dict. Write one with "
            "torch.save(model.state_dict(), path)."
        )
    if VERSION in content:
        state = content.get("state_dict")
        if not isinstance(state, Mapping) or not state:
            raise FlatnessError(
                f"'{path}' is a checkpoint of Lightning without weights (state_dict). Give another checkpoint."
            )
        return Checkpoint(path, state, digest, content)
    return _of_states(path, content, digest)


def _of_states(path: Path, content: Mapping[str, Any], digest: str) -> Checkpoint:
    """Find the state dict in a file that Lightning did not write. It is the whole file, or one entry of the file."""
    if _is_state(content):
        return Checkpoint(path, content, digest)
    states = {key: value for key, value in content.items() if isinstance(value, Mapping) and _is_state(value)}
    if len(states) == 1:
        ((part, state),) = states.items()
        return Checkpoint(path, state, digest, part=str(part))
    held = ", ".join(f"'{key}'" for key in list(content)[:8]) or "nothing"
    raise FlatnessError(
        f"'{path}' holds {held}: {'several sets of weights' if states else 'no state dict'}. Write the "
        "weights alone with torch.save(model.state_dict(), path)."
    )


def _is_state(content: Mapping[str, Any]) -> bool:
    values = [value for key, value in content.items() if not str(key).endswith("_extra_state")]
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _read_pickle(path: Path, trust: bool) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.\w+)", str(error))
        if trust or not found:
            raise FlatnessError(_broken(path, error)) from error
        raise FlatnessError(
            f"'{path}' holds a Python object, {found[1]}, beside the weights. Unpickling it can run any code. If you "
            "trust whoever wrote the file, add --trust."
        ) from error
    except (ModuleNotFoundError, AttributeError) as error:
        raise FlatnessError(
            f"'{path}' holds a Python object whose class is not found ({error}). Run this command in a folder where "
            "Python can import the code of the training run."
        ) from error
    except Exception as error:  # torch, zipfile, pickle and struct raise errors of many types
        raise FlatnessError(_broken(path, error)) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise UsageError(f"Reading '{path}' needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise FlatnessError(_broken(path, error)) from error


def _is_result(path: Path) -> bool:
    """Return whether a file is one that ``save`` of a result has written: arrays of numpy in a zip file."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _broken(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"'{path}' is a pointer of Git LFS, not the file itself: fetch it with git lfs pull."
    if not start:
        return f"'{path}' is empty."
    if _is_result(path):
        return f"'{path}' is no checkpoint, but a result: `load` of its class reads it, e.g. lf.FlatnessReport.load."
    if start.startswith(b"PK"):
        return f"'{path}' is cut off or damaged ({path.stat().st_size:,} bytes): copy or download it again."
    begins = "".join(character for character in start.decode("latin-1")[:24] if character.isprintable())
    # The message of an UnpicklingError is left out because it is a page of text about the arguments of torch.load.
    reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:120]})"
    return f"'{path}' is not a checkpoint, or is damaged: it begins with {begins!r}{reason}."


def _about_folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    files = [name for name in names if name.endswith((".ckpt", ".pt", ".pth"))]
    if "config.json" in names or (weights and not files):
        file = f"'{path / weights[0]}'" if weights else "its file of weights"
        return f"'{path}' is a folder of a Hugging Face model: give {file} with --model CLASS."
    if ".metadata" in names or "meta.pt" in names:
        return f"'{path}' is a checkpoint in several pieces: join them with `{CONSOLIDATE} {path}`."
    return f"'{path}' is a folder: name a file" + (f", such as '{path / files[0]}'." if files else "; it has none.")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
