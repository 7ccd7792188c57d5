"""The base class of all results. It turns a result into text, HTML, plain data, a data frame or a file."""

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
    """Base class of results, with a one-line ``repr``, a table for notebooks, and conversion to plain data.

    Subclasses are frozen dataclasses with ``repr=False``. They define ``_line`` and ``table``. Subclasses with
    tensors or mappings have ``eq=False``: an object equals only itself. To compare values, use :meth:`to_dict`.
    """

    # Names of the fields whose tensors are so short that ``to_dict()`` has them even with ``tensors=False``.
    _short: ClassVar[tuple[str, ...]] = ()

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """Return all fields and properties as values that JSON can hold, and the class name as ``"result"``.

        NaN and infinities become None. Long tensors, such as block traces or per-sample values, are left out; with
        ``tensors=True`` they become nested lists. To keep everything, use :meth:`save`.
        """
        return {
            "result": type(self).__name__,
            **{name: _plain(v, tensors) for name, v in self._values(tensors).items()},
        }

    def to_pandas(self) -> Any:
        """Return the main numbers as a ``pandas.DataFrame``, in which unknown numbers are NaN.

        Depending on the result, the rows are layers, models, eigenvalues or points, or there is one row.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise FlatnessError(
                f"{type(self).__name__}.to_pandas needs pandas: pip install pandas. Without it, to_dict() has the "
                "same numbers."
            ) from error
        return pandas.DataFrame(self._rows())

    def table(self) -> Table:
        """Return a ``rich`` table of the main numbers."""
        raise NotImplementedError

    # A result that is a Mapping, too, needs these two: a Mapping is equal to others, and has no hash.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._line()})"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def _line(self) -> str:
        """Return the main numbers as one line of text, which ``repr`` shows."""
        raise NotImplementedError

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the data frame; by default one row with all values that are not tensors."""
        return [flat(self._values(tensors=False))]

    def _values(self, tensors: bool) -> dict[str, Any]:
        """Return a mapping from the names of fields and public properties to their values.

        Values that are mappings or records come last. Long tensors are left out unless ``tensors`` is True.
        """
        kinds = get_type_hints(type(self))
        wanted = {field.name: kinds[field.name] for field in fields(cast(Any, self))} | _properties(type(self))
        values = {
            name: getattr(self, name)
            for name, kind in wanted.items()
            if tensors or name in self._short or not has_tensors(kind)
        }
        info = values.pop("info", None)  # the fields of a LayerInfo become entries beside the numbers
        values = values if info is None else info._values(tensors) | values
        return dict(sorted(values.items(), key=lambda entry: isinstance(entry[1], (Mapping, Record))))


def _properties(owner: type) -> dict[str, Any]:
    """Return a mapping from the names of a class's public properties to their types."""
    found = {name: value for name, value in vars(owner).items() if isinstance(value, property) and name[0] != "_"}
    return {name: get_type_hints(value.fget)["return"] for name, value in found.items()}


def _plain(value: Any, tensors: bool) -> Any:
    """Return a value in a form that JSON can hold; NaN and infinities become None."""
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
    """Return ``values`` as a row of a data frame, in which each entry of a nested mapping has a column of its own.

    For example, ``{"standard_errors": {"a": 1}}`` becomes ``{"a_standard_error": 1}``. Values that are records are
    left out.
    """
    row: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            row |= {f"{key}_{name.removesuffix('s')}": entry for key, entry in value.items()}
        elif not isinstance(value, Record):
            row[name] = value
    return row
