"""Save results to compressed ``.npz`` files, and load them, without pickle.

A file has plain arrays and one JSON text with the fields of the result. In this text, the name of an array stands for
a tensor, and strings stand for NaN and infinities. When a file is read, the type annotations of the fields decide how
each value is converted. :func:`_from_format_1` converts files of the earlier format 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError

Result = TypeVar("Result", bound="Saved")

# Version of the file format. Every file states its version, so that later versions of the package can read the file.
FORMAT = 2
RECORD = "record"  # name of the array that holds the JSON text


class Saved:
    """Base class of frozen dataclasses that can be saved and loaded.

    Fields may be tensors, plain values, other such dataclasses, and tuples or mappings of these.
    """

    # The earliest files of some classes have arrays but no JSON text. For such a class, these are the names of the
    # arrays in its earliest files. For all other classes, the set is empty.
    _unlabelled: ClassVar[frozenset[str]] = frozenset()

    def save(self, path: str | PathLike[str]) -> Path:
        """Write this object to a compressed ``.npz`` file, without pickle, and return the path of the file."""
        import numpy as np

        path = Path(path)
        if path.suffix != ".npz":
            raise FlatnessError(f"Results are written to .npz files, but '{path}' is not one. End the name with .npz.")
        arrays: dict[str, Any] = {}
        record = {"format": FORMAT, "result": type(self).__name__, "fields": _packed(self, "", arrays)}
        text = json.dumps(record, allow_nan=False)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays | {RECORD: np.array(text)})
        return path

    @classmethod
    def load(cls: type[Result], path: str | PathLike[str]) -> Result:
        """Return the object that :meth:`save` wrote to a file.

        Raises a :class:`FlatnessError` if the file is broken, holds an object of another class, or was written in a
        later format by a later version of the package.
        """
        import numpy as np

        with Path(path).open("rb") as stream:
            try:
                with np.load(stream, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                text: dict[str, Any]
                if cls._unlabelled and arrays.keys() == cls._unlabelled:
                    text = {"format": 1, "result": cls.__name__, "fields": {}}
                else:
                    text = json.loads(str(arrays.pop(RECORD)))
                if text["format"] > FORMAT:
                    raise FlatnessError(
                        f"'{path}' was written by a later version of lightning_flatness (format {text['format']}; this "
                        f"version reads up to {FORMAT}). Update lightning_flatness."
                    )
                if text["result"] != cls.__name__:
                    raise FlatnessError(
                        f"There is a {text['result']} in '{path}', not a {cls.__name__}. Load the file with "
                        f"{text['result']}.load."
                    )
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                entries = text["fields"] if text["format"] > 1 else _from_format_1(text["fields"], tensors)
                record: Result = _unpacked(entries, cls, tensors)
            except FlatnessError:
                raise
            except Exception as error:  # numpy, zipfile, zlib, struct, json and torch raise errors of many types
                reason = f"{type(error).__name__}: {error}"
                raise FlatnessError(
                    f"'{path}' was not written by {cls.__name__}.save, or is broken ({reason})."
                ) from error
        return record


def has_tensors(kind: Any) -> bool:
    """Return whether values of the type ``kind`` can be tensors, or tuples or mappings of tensors."""
    return kind is Tensor or any(map(has_tensors, get_args(kind)))


def _packed(value: Any, name: str, arrays: dict[str, Any]) -> Any:
    """Convert a value to a form that JSON can hold, and add its tensors to ``arrays``.

    ``name`` is the path to the value in the saved object, such as ``layers.conv1.block_traces``. The array of a tensor
    has this name.
    """
    if isinstance(value, Tensor):
        while name in arrays or name == RECORD:  # because layer names contain dots, two paths may be equal
            name += "_"
        arrays[name] = value.detach().cpu().numpy()
        return name
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {str(key): _packed(entry, f"{prefix}{key}", arrays) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_packed(entry, f"{prefix}{index}", arrays) for index, entry in enumerate(value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unpacked(value: Any, kind: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`_packed`: convert ``value`` to the type ``kind``, or raise an error if it does not fit this type."""
    parts, origin = get_args(kind), get_origin(kind)
    if NoneType in parts:
        (kind,) = (part for part in parts if part is not NoneType)
        return None if value is None else _unpacked(value, kind, tensors)
    if kind is Tensor:
        return tensors[value]
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        if unknown := sorted(value.keys() - {field.name for field in fields(kind)}):
            raise TypeError(f"unknown field {unknown[0]}")
        # A field with a default may be missing, because the field may have been added after the file was written.
        read = [field.name for field in fields(kind) if field.name in value or _is_needed(field)]
        return cast(Any, kind)(**{name: _unpacked(value[name], kinds[name], tensors) for name in read})
    if origin is tuple:
        return tuple(_unpacked(entry, parts[0], tensors) for entry in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _unpacked(entry, parts[1], tensors) for key, entry in value.items()}
    if kind is float:
        return float(value)
    if kind in (bool, int, str) and type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _is_needed(field: Any) -> bool:
    """Return whether a dataclass field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _from_format_1(entries: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert the fields of a file of format 1 to format 2.

    In format 1 the JSON text did not mention tensors: each array had the name of a field, and the tuple
    ``coordinates`` was in arrays ``coordinates_0``, ``coordinates_1``.
    """
    pieces = [name for name in tensors if name.startswith("coordinates_")]
    whole = {name: name for name in tensors if name not in pieces}
    return {**entries, **whole, **({"coordinates": sorted(pieces)} if pieces else {})}
