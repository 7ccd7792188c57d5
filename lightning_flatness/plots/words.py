"""Make the texts of figures: names of measures, the measured data, and whether numbers are exact.

Other functions of this module check the name of a measure, drop unknown and infinite values, and combine standard
errors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning_flatness.errors import FlatnessError
from lightning_flatness.results import SAMPLED, FlatnessReport, LayerInfo, number_of
from lightning_flatness.results.texts import samples_of

NAMES = {
    "hessian_trace": "Hessian trace",
    "relative_flatness": "relative flatness",
    "normalized_relative_flatness": "normalised relative flatness",
    "channelwise_flatness": "channel-wise flatness",
    "neuronwise_flatness": "neuron-wise flatness",
    "layerwise_flatness": "layer-wise flatness",
}
METHODS = {
    "closed_form": "closed form",
    "gauss_newton": "Gauss-Newton",
    "gauss_newton+hutchinson": "Gauss-Newton, and estimates of the rest of the Hessian",
}


def label_of(measure: str) -> str:
    """Return the name of a measure with its unit, for the label of an axis."""
    return f"{NAMES[measure]}  ({'loss per squared weight' if measure == 'hessian_trace' else 'loss'})"


def check_measure(measure: str, known: Iterable[str]) -> None:
    """Raise an error unless ``measure`` is one of the ``known`` measures."""
    if measure not in known:
        raise FlatnessError(f"measure={measure!r}: give one of {', '.join(known)}.")


def loss_of(report: FlatnessReport, data: str | None) -> str:
    """Return a text with the mean loss of a report (left out if not known), the number of samples and the data."""
    where = samples_of(report.num_samples, data or report.data)
    return where if math.isnan(report.loss) else f"{report.loss_name or 'loss'} {report.loss:.3g} on {where}"


def subject_of(names: Sequence[str]) -> str:
    """Return the name of a single layer, or a text that says over how many layers the numbers are summed."""
    return f"layer {names[0]}" if len(names) == 1 else f"{number_of(len(names), 'layer')}, summed"


def exactness(infos: Collection[LayerInfo]) -> str:
    """Return a text that says whether the layers' numbers are exact, and by which method they were measured.

    If the network's features were in a lower precision than float32, the text says so.
    """
    inexact = [info for info in infos if not info.exact]
    if all(info.reason == SAMPLED for info in inexact):
        text = "estimated, with some classes sampled" if inexact else "exact"
    else:
        text = "not exact"
    methods = dict.fromkeys(METHODS[info.method] for info in inexact or infos)
    count = f"{len(inexact)} of {len(infos)} layers " if 0 < len(inexact) < len(infos) else ""
    low = sorted({info.precision for info in infos} - {"float32", "float64"})
    return f"{count}{text} ({', '.join(methods)})" + "".join(f", {name} features" for name in low)


def is_exact(flag: float | None) -> bool:
    """Return whether a record of a history is drawn as exact; ``flag`` is the entry ``exact`` of the record.

    If the record has no such entry, ``flag`` is None, and the record is drawn as exact.
    """
    return flag is None or bool(flag)


def recorded_exactness(history: Sequence[Mapping[str, Any]]) -> str:
    """Return a text that says whether the numbers of a history are exact, and by which methods they were measured.

    The text is empty if no record says whether it is exact.
    """
    known = [record["exact"] for record in history if record.get("exact") is not None]
    if not known:
        return ""
    methods = ", ".join(record["method"] for record in history if record.get("method")).split(", ")
    names = dict.fromkeys(METHODS.get(name, name) for name in methods if name)
    text = "exact" if all(known) else "not exact where dashed" if any(known) else "not exact"
    return text + (f" ({', '.join(names)})" if names else "")


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are known (not None) and finite.

    Example:
        >>> finite([1.0, None, float("nan"), float("inf")])
        [1.0]
    """
    return [value for value in values if value is not None and math.isfinite(value)]


def known_error(*parts: float | None) -> float:
    """Return the root of the sum of squares of independent standard errors; unknown errors (None, NaN) count as zero.

    Example:
        >>> known_error(3.0, 4.0), known_error(None, float("nan"))
        (5.0, 0.0)
    """
    return math.hypot(*finite(parts))
