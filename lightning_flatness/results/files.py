"""Records in files: compressed ``.npz`` of plain arrays and one text in JSON, without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError

Result = TypeVar("Result")
Record = dict[str, Any]
Tensors = dict[str, Tensor]

# Written to files, so that later versions can tell how to read them.
FORMAT = 1


def write(path: str | PathLike[str], kind: type, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a record and its tensors to a file.

    Args:
        path: of the file, ending with ``.npz``.
        kind: class of the result.
        record: fields that JSON can hold, by name; tuples become lists.
        tensors: fields that are tensors, by name; the name ``"record"`` is taken.

    Returns:
        The path.

    Raises:
        FlatnessError: the path does not end with ``.npz``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(f"{folder}/a.npz", complex, {"real": 1.0}, {"imag": torch.tensor(2.0)})
        ...     read(path, complex, lambda record, tensors: {**record, "imag": float(tensors["imag"])})
        (1+2j)
    """
    import numpy as np

    path = Path(path)
    if path.suffix != ".npz":
        raise FlatnessError(f"Results are written to files .npz, and '{path}' is not one; end the name with .npz.")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    text = np.array(json.dumps({"format": FORMAT, "result": kind.__name__, "fields": record}))
    with path.open("wb") as file:
        np.savez_compressed(file, record=text, **arrays)
    return path


def read(
    path: str | PathLike[str], kind: type[Result], fields: Callable[[Record, Tensors], Mapping[str, Any]]
) -> Result:
    """Read a result from a file that :func:`write` has written.

    Args:
        path: of the file; it may have been renamed.
        kind: class of the result.
        fields: turns record and tensors into the arguments of ``kind``.

    Raises:
        FlatnessError: the file is broken, holds something else, or was written by a later version.
        OSError: there is no such file, or it cannot be opened.
    """
    import numpy as np

    with Path(path).open("rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            text = json.loads(str(arrays.pop("record")))
            _check(path, kind.__name__, text["format"], text["result"])
            return kind(**fields(text["fields"], {name: torch.from_numpy(array) for name, array in arrays.items()}))
        except FlatnessError:
            raise
        except Exception as error:  # numpy, zipfile, zlib, struct, json and torch raise errors of many types
            reason = f"{type(error).__name__}: {error}"
            raise FlatnessError(f"'{path}' is not a file of {kind.__name__}.save, or is broken ({reason}).") from error


def _check(path: str | PathLike[str], wanted: str, written_as: int, stored: str) -> None:
    if written_as > FORMAT:
        raise FlatnessError(f"'{path}' was written by a later version of lightning_flatness; update this one.")
    if stored != wanted:
        raise FlatnessError(f"There is a {stored} in '{path}', not a {wanted}.")
