"""Records in files: compressed ``.npz`` of plain arrays and one text in JSON, without pickle."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_flatness.errors import FlatnessError

Result = TypeVar("Result", bound="Saved")

# Written to files, so that later versions can tell how to read them.
FORMAT = 1


class Saved:
    """A record of tensors and of what JSON can hold. In JSON tuples become lists; ``_unpack`` undoes it."""

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a compressed file ``.npz`` of plain arrays and text, without pickle, and return its path."""
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
        """Read a file of :meth:`save`; a :class:`FlatnessError` says that it is broken or holds something else."""
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
        """What goes into JSON, and the arrays."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value for name, value in vars(self).items() if name not in tensors}, tensors

    @staticmethod
    def _unpack(fields: dict[str, Any]) -> dict[str, Any]:
        """From what was packed to the arguments of the class."""
        raise NotImplementedError
