"""Make the rows of a comparison from reports, and the covariances between the errors of the models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_flatness.checks import as_number
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional.sampling import grouped, jackknife_covariance, means_without_groups
from lightning_flatness.results import ComparedModel, FlatnessReport

# Measures that a report sums over layers, and for which it has standard errors.
SUMS = ("normalized_relative_flatness", "relative_flatness", "hessian_trace")
# Measures that divide relative flatness by a mean over samples, and the name of that mean.
RATIOS = {"relative_flatness_per_loss": "loss", "relative_flatness_per_curvature": "curvature"}


def row_of(
    name: str,
    report: FlatnessReport,
    errors: dict[str, float],
    train_loss: float | None = None,
    outcome: float | None = None,
) -> ComparedModel:
    """Return the row of a comparison for a model, from its report.

    If ``train_loss`` is None and the report was measured on training data, the report's loss is the training loss.
    Raise a :class:`FlatnessError` if the outcome is no number.
    """
    number = math.nan if outcome is None else as_number(outcome)
    if number is None:
        raise FlatnessError(f"outcome= of model '{name}' is {outcome!r}; give a number.")
    if train_loss is None and report.data == "train":
        train_loss = report.loss
        errors = errors | {"train_loss": errors["loss"]} if "loss" in errors else errors
    infos = [layer.info for layer in report.layers.values()]
    return ComparedModel(
        name=name,
        loss=report.loss,
        accuracy=report.accuracy,
        normalized_relative_flatness=report.normalized_relative_flatness,
        relative_flatness=report.relative_flatness,
        relative_flatness_per_loss=report.relative_flatness_per_loss,
        relative_flatness_per_curvature=report.relative_flatness_per_curvature,
        hessian_trace=report.hessian_trace,
        weight_norm=report.weight_norm,
        errors=errors,
        exact=report.exact,
        method=", ".join(dict.fromkeys(info.method for info in infos)),
        reasons=tuple(dict.fromkeys(info.reason for info in infos if info.reason)),
        precision=report.precision,
        loss_name=report.loss_name,
        data=report.data,
        num_samples=report.num_samples,
        layers=tuple(report.layers),
        filters=tuple(info.num_filters for info in infos),
        features=tuple(info.patch_length for info in infos),
        num_classes=max((info.num_classes for info in infos), default=0),
        depth=report.depth,
        batch_norms=report.batch_norms,
        fresh_batch_norms=report.fresh_batch_norms,
        train_loss=math.nan if train_loss is None else train_loss,
        outcome=number,
    )


def covariances_of(reports: Sequence[FlatnessReport], is_paired: bool) -> dict[str, Tensor]:
    """Return a mapping from each number's name, such as ``"loss"``, to the covariances of the reports' errors.

    The covariances of ``M`` reports are float64 ``(M, M)``. A diagonal entry is the variance over samples, plus the
    variance of random estimates, such as those from random probes. ``is_paired`` says whether all models were measured
    on the same samples. If they were, and all reports have per-sample values of a number, the off-diagonal entries for
    this number come from a jackknife over groups of samples (``docs/theory.md``, "Errors over samples"). Otherwise
    these entries are zero.
    """
    means = [_means_without_groups(report) for report in reports]
    found = {}
    for number in ("loss", "accuracy", *SUMS, *RATIOS):
        known = [of_report.get(number) for of_report in means]
        replicates = [one for one in known if one is not None]
        if is_paired and len(replicates) == len(reports):
            covariance = jackknife_covariance(torch.stack(replicates, dim=1))
        else:
            own = [
                report.sampling_errors.get(number, math.nan) ** 2
                if replicate is None
                else float(jackknife_covariance(replicate[:, None]))
                for report, replicate in zip(reports, known, strict=True)
            ]
            covariance = torch.tensor(own, dtype=torch.float64, device="cpu").diag()
        estimates = [_estimate_error(report, number) ** 2 for report in reports]
        found[number] = covariance + torch.tensor(estimates, dtype=torch.float64, device="cpu").diag()
    return found


def are_paired(reports: Sequence[FlatnessReport], together: bool = False) -> bool:
    """Return whether all reports have per-sample values of the same samples in the same order.

    With ``together``, the samples are known to be the same. Otherwise the reports must have equal sample weights, and a
    sample that two networks both classify correctly must have the same class in both reports. This check detects
    reports whose samples differ or are in another order. It needs correctly classified samples of at least two classes;
    without these, the result is False. With ``together``, raise a :class:`FlatnessError` if the numbers of samples
    differ.
    """
    if not all({"correct", "prediction", "weight"} <= report.samples.keys() for report in reports):
        return False
    sizes = [len(report.samples["weight"]) for report in reports]
    if together and len(set(sizes)) > 1:
        listed = " / ".join(map(str, sizes))
        raise FlatnessError(f"same_samples=True, but the reports have {listed} samples. Leave same_samples= out.")
    if together:
        return True
    first = reports[0].samples
    if not all(torch.equal(report.samples["weight"], first["weight"]) for report in reports[1:]):
        return False
    classes = torch.full_like(first["prediction"], -1)
    for report in reports:
        correct = report.samples["correct"] == 1
        both = correct & (classes >= 0)
        if bool((classes[both] != report.samples["prediction"][both]).any()):
            return False
        classes = torch.where(correct, report.samples["prediction"], classes)
    return len(classes[classes >= 0].unique()) > 1


def _means_without_groups(report: FlatnessReport) -> dict[str, Tensor]:
    """Return a mapping from each number's name, such as ``"loss"``, to its jackknife means ``(G,)``.

    Entry ``g`` is the mean over all samples except those of group ``g``. Numbers without per-sample values in the
    report are left out.
    """
    samples = report.samples
    if "weight" not in samples:
        return {}
    weight = samples["weight"].double()
    values = {name: samples[name] for name in ("loss", "curvature") if name in samples}
    for measure in SUMS:
        of_layers = [layer.samples.get(measure) for layer in report.layers.values()]
        known = [one for one in of_layers if one is not None]
        if known and len(known) == len(of_layers):
            values[measure] = torch.stack(known).sum(0)
    means = {name: _without(one, weight) for name, one in values.items()}
    if "correct" in samples:
        means["accuracy"] = _without(samples["correct"], (weight > 0).double())
    for ratio, divisor in RATIOS.items():
        if {"relative_flatness", divisor} <= means.keys():
            means[ratio] = means["relative_flatness"] / means[divisor]
    return means


def _without(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means ``(G,)`` of ``values``. Entry ``g`` leaves out the samples of group ``g``."""
    positions = torch.arange(len(weights), device="cpu")
    weighted = torch.where(weights > 0, values.double() * weights, 0.0)  # values of ignored samples are NaN
    return means_without_groups(grouped(weighted[:, None], positions), grouped(weights[:, None], positions)[:, 0])[:, 0]


def _estimate_error(report: FlatnessReport, number: str) -> float:
    """Return the part of a number's standard error that comes from random estimates, such as those from probes.

    The errors of different layers are independent, so their squares add up.
    """
    measure = "relative_flatness" if number in RATIOS else number
    error = math.hypot(*(layer.standard_errors.get(measure, 0.0) for layer in report.layers.values()))
    divisor = float(getattr(report, RATIOS[number])) if number in RATIOS else 1.0
    return error / divisor if divisor else math.nan


def errors_of(covariances: Mapping[str, Tensor], index: int) -> dict[str, float]:
    """Return a mapping from each number's name to its standard error, for the model at ``index``.

    Errors that are not known (NaN) are left out.
    """
    found = {number: float(covariance[index, index]) for number, covariance in covariances.items()}
    return {number: math.sqrt(variance) for number, variance in found.items() if math.isfinite(variance)}
