"""Records in files: numpy's npz, compressed, of plain arrays and one text in JSON, without pickle."""

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

# In files, so that later versions can tell what they read.
FORMAT = 1


def write(path: str | PathLike[str], kind: type, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write what JSON can hold, and tensors.

    Args:
        path: of the file, ``.npz``.
        kind: of the result.
        record: by name; tuples become lists.
        tensors: by name; not ``"record"``.

    Returns:
        The path.

    Raises:
        FlatnessError: the name ends with something else.

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
        raise FlatnessError(f"Results are kept in files .npz, and '{path}' is not one; give a name that ends so.")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    text = np.array(json.dumps({"format": FORMAT, "result": kind.__name__, "fields": record}))
    with path.open("wb") as file:
        np.savez_compressed(file, record=text, **arrays)
    return path


def read(
    path: str | PathLike[str], kind: type[Result], fields: Callable[[Record, Tensors], Mapping[str, Any]]
) -> Result:
    """What :func:`write` has written.

    Args:
        path: of the file, whatever it is called now.
        kind: of the result.
        fields: its arguments, from record and tensors.

    Raises:
        FlatnessError: anything else is in the file, or it is broken.
        OSError: there is no such file, or it may not be opened.
    """
    import numpy as np

    with Path(path).open("rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            found = json.loads(str(arrays.pop("record")))
            _check(path, kind.__name__, found["format"], found["result"])
            return kind(**fields(found["fields"], {name: torch.from_numpy(array) for name, array in arrays.items()}))
        except FlatnessError:
            raise
        except Exception as error:  # of numpy, zipfile, zlib, struct, json, torch: there is no end of ways to be broken
            reason = f"{type(error).__name__}: {error}"
            raise FlatnessError(f"'{path}' is not a file of {kind.__name__}.save, or broken ({reason}).") from error


def _check(path: str | PathLike[str], wanted: str, written_by: int, found: str) -> None:
    if written_by > FORMAT:
        raise FlatnessError(f"'{path}' was written by a later version of lightning_flatness; update this one.")
    if found != wanted:
        raise FlatnessError(f"There is a {found} in '{path}', not a {wanted}.")
