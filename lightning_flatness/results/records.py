"""What all records have: one line of text, a table for notebooks, plain data and rows, and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, cast, get_type_hints

from rich.table import Table
from torch import Tensor

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results.files import Saved, has_tensors
from lightning_flatness.results.texts import as_html


class Record(Saved):
    """A frozen dataclass that prints as one line, shows as a table in notebooks, and turns into plain data.

    Subclasses are dataclasses with ``repr=False``; they define ``_line`` and ``table``.
    """

    # Tensors that are short, and so a part of ``to_dict()``.
    _short: ClassVar[tuple[str, ...]] = ()

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """Return all fields and properties as values that JSON can hold; ``"result"`` is the name of the class.

        NaN and infinities are None. Long tensors, such as block traces or values of single samples, are left out unless
        ``tensors`` asks for them, as nested lists; :meth:`save` keeps them, and loses nothing.
        """
        return {
            "result": type(self).__name__,
            **{name: _plain(v, tensors) for name, v in self._values(tensors).items()},
        }

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` of :meth:`to_dict`'s numbers, with NaN for what is not known."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise FlatnessError(
                f"{type(self).__name__}.to_pandas needs pandas: pip install pandas. Without it, to_dict() has the "
                "same numbers."
            ) from error
        return pandas.DataFrame(self._rows())

    def table(self) -> Table:
        """Return a rich table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._line()})"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def _line(self) -> str:
        """Return what the record is about and its main numbers, in one line."""
        raise NotImplementedError

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of a data frame; by default one, of the values that are no tensors."""
        return [flat(self._values(tensors=False))]

    def _values(self, tensors: bool) -> dict[str, Any]:
        """Return fields and properties by name; mappings and records come last."""
        kinds = get_type_hints(type(self))
        wanted = {field.name: kinds[field.name] for field in fields(cast(Any, self))} | _properties(type(self))
        values = {
            name: getattr(self, name)
            for name, kind in wanted.items()
            if tensors or name in self._short or not has_tensors(kind)
        }
        info = values.pop("info", None)  # how a layer is measured: its fields stand beside the numbers
        values = values if info is None else info._values(tensors) | values
        return dict(sorted(values.items(), key=lambda entry: isinstance(entry[1], (Mapping, Record))))


def _properties(owner: type) -> dict[str, Any]:
    """Return the types of the public properties of a class."""
    found = {name: value for name, value in vars(owner).items() if isinstance(value, property) and name[0] != "_"}
    return {name: get_type_hints(value.fget)["return"] for name, value in found.items()}


def _plain(value: Any, tensors: bool) -> Any:
    """Return a value as JSON can hold it: NaN and infinities are None."""
    if isinstance(value, Record):
        return value.to_dict(tensors)
    if isinstance(value, Tensor):
        return _plain(value.tolist(), tensors)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry, tensors) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row; a mapping such as ``{"standard_errors": {"a": 1}}`` becomes ``a_standard_error``."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            row |= {f"{key}_{name.removesuffix('s')}": entry for key, entry in value.items()}
        elif not isinstance(value, Record):
            row[name] = value
    return row
