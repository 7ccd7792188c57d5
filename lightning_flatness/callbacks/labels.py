"""Turn reports into records for the history and into numbers for loggers. Warn of numbers that are not exact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_flatness.model.names import listed
from lightning_flatness.results import FlatnessReport, LayerFlatness, LayerInfo, summary_table
from lightning_flatness.results.tables import PARTS, SAMPLED
from lightning_flatness.results.texts import DATA

# Numbers that are logged in addition to flatness. The dict maps a logged key to a field of the report. The key of the
# accuracy is top1, since the LightningModule logs an accuracy of its own.
BESIDE = {"loss": "loss", "top1": "accuracy", "curvature": "curvature"}
# Further measures. Their values in a record are None if the report does not have them.
FURTHER = ("normalized_relative_flatness", "channelwise_flatness")
# Keys that say what was measured. Numbers of two records can only be compared if these are the same.
MEASURED = ("data", "layers", "matrix", "loss_name", "num_samples")
# Largest number of layers that a warning names.
MOST_NAMES = 8


def with_data(
    reports: Mapping[int, FlatnessReport], data: str, is_test: bool, seconds: float
) -> dict[int, FlatnessReport]:
    """Return the report of each validation loader, with the name of its data and the seconds that measuring took.

    With several loaders the seconds of each loader are unknown, so they are NaN.
    """
    data = "test" if is_test and data == "val" else data
    seconds = seconds if len(reports) == 1 else math.nan
    return {
        loader: replace(report, data=f"{data}, loader {loader}" if loader else data, seconds=seconds)
        for loader, report in reports.items()
    }


def values_of(report: FlatnessReport, measures: Sequence[str]) -> dict[str, Any]:
    """Return the record of a report for the history. It has numbers, and labels that say how these were measured.

    If there are several layers, the record has numbers for each layer, too. Keys have no prefix. None stands for NaN.
    """
    errors = report.sampling_errors
    record = {
        "data": report.data,
        "num_samples": report.num_samples,
        "layers": list(report.layers),
        "exact": report.exact,
        "method": ", ".join(dict.fromkeys(layer.method for layer in report.layers.values())),
        "precision": report.precision,
        "loss_name": report.loss_name,
        **{key: known(getattr(report, field)) for key, field in BESIDE.items()},
        **{f"{key}_error": known(errors.get(field, math.nan)) for key, field in BESIDE.items()},
        **_measures(report, measures),
        "weight_norm": report.weight_norm,
    }
    for name, layer in report.layers.items() if len(report.layers) > 1 else ():
        own = {"exact": layer.exact, "method": layer.method, **_measures(layer, measures)}
        record |= {f"{name}/{key}": value for key, value in own.items()}
    return record


def values_of_loaders(reports: Mapping[int, FlatnessReport], measures: Sequence[str]) -> dict[str, Any]:
    """Return the values of several validation loaders. From the second loader on, keys end with the loader's index."""
    return {
        f"{key}/dataloader_idx_{loader}" if loader else key: value
        for loader, report in reports.items()
        for key, value in values_of(report, measures).items()
    }


def numbers_of(record: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]] = ()) -> dict[str, float]:
    """Return the numbers of a record that loggers get, as floats. ``exact`` becomes 1 or 0.

    Values that are None are left out. But if one of the ``earlier`` records has a number under the same key, None
    becomes NaN. So a key that was logged once is always logged.

    Example:
        >>> numbers_of({"epoch": 3, "exact": True, "loss": None, "hessian_trace": 2.0, "method": "closed_form"})
        {'exact': 1.0, 'hessian_trace': 2.0}
        >>> numbers_of({"loss": None}, [{"loss": 0.5}])
        {'loss': nan}
    """
    known = {key for one in [*earlier, record] for key, value in one.items() if isinstance(value, (bool, float))}
    return {
        key: math.nan if value is None else float(value)
        for key, value in record.items()
        if key in known and _is_logged(key.partition("/dataloader_idx_")[0])
    }


def print_summary(layers: Mapping[str, LayerInfo], left_out: Mapping[str, str], data: str, prefix: str) -> None:
    """Print how, on which data and under which prefix each layer is measured, and why other layers are left out."""
    title = f"Flatness on {DATA.get(data, data)} is measured for these layers, under '{prefix}'."
    Console().print(summary_table(layers, left_out, title))


def warn_of_inexact(
    infos: Mapping[int, Iterable[LayerInfo]], told: Set[tuple[int, str]], prefix: str
) -> frozenset[tuple[int, str]]:
    """Warn of layers whose numbers are not exact, and return all layers that a warning has named so far.

    ``infos`` maps the index of a validation loader to its measured layers. ``told`` has the layers that earlier
    warnings have named; these get no second warning. ``told`` and the returned set have pairs of a loader's index and a
    layer's name. A layer that was named for the first loader is not named again for further loaders.
    """
    new: set[tuple[int, str]] = set()
    names: dict[tuple[str, str], list[str]] = {}
    for loader, of_loader in infos.items():
        for info in of_loader:
            if not info.exact and not {(0, info.name), (loader, info.name)} & (told | new):
                names.setdefault((info.method, info.reason), []).append(info.name)
                new.add((loader, info.name))
    if names:
        keys = [
            f"{prefix}/exact" + f"/dataloader_idx_{loader}" * (loader > 0) for loader in sorted({i for i, _ in new})
        ]
        rank_zero_warn(
            f"FlatnessCallback: not all numbers under '{prefix}/' are exactly those of the Hessian, and "
            f"{_quoted(keys)} {'is' if len(keys) == 1 else 'are'} 0. "
            + " ".join(f"{_quoted(dict.fromkeys(group))}: {_what(*what)}." for what, group in names.items())
            + " With strict=True this is an error."
        )
    return frozenset(told | new)


def warn_of_mixed(name: str, prefix: str, record: Mapping[str, Any], earlier: Mapping[str, Any], resumed: bool) -> None:
    """Warn if the numbers of a record cannot be compared with those of ``earlier``, the record before it.

    ``resumed`` says whether a run was resumed from a checkpoint after ``earlier``. Only then are the number of samples
    and the hash in ``loss_name`` compared. Within a run, the number of samples may vary, and so does the hash if the
    loss counts its calls.
    """

    def measured(value: Any) -> Any:
        return value if resumed or not isinstance(value, str) else value.partition(" #")[0]

    changes = [
        f"{key} was {earlier[key]!r} and is {record[key]!r}"
        for key in record
        if key.partition("/dataloader_idx_")[0] in (MEASURED if resumed else MEASURED[:-1])
        and measured(record[key]) != measured(earlier.get(key, record[key]))
    ]
    if changes:
        rank_zero_warn(
            f"{name}: the measurement under '{prefix}' has changed from epoch {record['epoch']} on: "
            f"{'; '.join(changes)}. The numbers before and after cannot be compared. To begin a new history, give "
            "another prefix=."
        )


def _measures(result: FlatnessReport | LayerFlatness, measures: Sequence[str]) -> dict[str, float | None]:
    names = [*measures, *FURTHER]
    return {
        **{name: float(getattr(result, name)) for name in measures},
        **{name: known(getattr(result, name, math.nan)) for name in FURTHER},
        **{f"{name}_error": known(result.sampling_errors.get(name, math.nan)) for name in names},
    }


def known(value: float) -> float | None:
    """Return a number, or None in place of NaN."""
    return None if math.isnan(value) else float(value)


def _is_logged(name: str) -> bool:
    """Return whether loggers get the number with this key.

    Loggers get standard errors only of measures that are summed over layers. ``accuracy`` is not logged, because the
    LightningModule logs it.
    """
    is_minor = "/" in name or name.removesuffix("_error") in BESIDE
    return name != "accuracy" and not (name.endswith("_error") and is_minor)


def _quoted(names: Iterable[str]) -> str:
    return listed([f"'{name}'" for name in names], MOST_NAMES)


def _what(method: str, reason: str) -> str:
    return f"estimates, since {reason}" if reason == SAMPLED else f"{PARTS[method]}, since {reason}"
