"""Saving records to compressed ``.npz`` files that contain plain arrays and one JSON text, without pickle."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError

Result = TypeVar("Result", bound="Saved")

# Version of the file format, written to every file, so that later versions of the package know how to read it.
FORMAT = 1


class Saved:
    """A record of tensors and of values that JSON can represent, which can be saved and loaded.

    JSON turns tuples into lists; ``_unpack`` turns them back.
    """

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the record to a compressed ``.npz`` file, without pickle, and return the file's path."""
        import numpy as np

        path = Path(path)
        if path.suffix != ".npz":
            raise FlatnessError(f"Results are written to files .npz, and '{path}' is not one; end the name with .npz.")
        fields, tensors = self._pack()
        text = json.dumps({"format": FORMAT, "result": type(self).__name__, "fields": fields}, default=dict)
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, record=np.array(text), **arrays)
        return path

    @classmethod
    def load(cls: type[Result], path: str | PathLike[str]) -> Result:
        """Read a file that :meth:`save` wrote; raise a :class:`FlatnessError` if it is broken or of another kind."""
        import numpy as np

        with Path(path).open("rb") as stream:
            try:
                with np.load(stream, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                text = json.loads(str(arrays.pop("record")))
                if text["format"] > FORMAT:
                    raise FlatnessError(f"'{path}' was written by a later version of lightning_flatness; update it.")
                if text["result"] != cls.__name__:
                    raise FlatnessError(f"There is a {text['result']} in '{path}', not a {cls.__name__}.")
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                return cls(**cls._unpack({**text["fields"], **tensors}))
            except FlatnessError:
                raise
            except Exception as error:  # numpy, zipfile, zlib, struct, json and torch raise errors of many types
                reason = f"{type(error).__name__}: {error}"
                raise FlatnessError(
                    f"'{path}' is not a file of {cls.__name__}.save, or is broken ({reason})."
                ) from error

    def _pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the fields to write as JSON, and the tensors to write as arrays."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value for name, value in vars(self).items() if name not in tensors}, tensors

    @staticmethod
    def _unpack(fields: dict[str, Any]) -> dict[str, Any]:
        """Convert the fields and tensors read from a file to arguments of the class."""
        raise NotImplementedError
