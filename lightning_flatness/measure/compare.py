"""Compare models by their flatness, with the errors of their differences, and with cautions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_flatness.checks import as_number
from lightning_flatness.errors import FlatnessError
from lightning_flatness.measure.batches import check_rereadable
from lightning_flatness.measure.cautions import cautions_of
from lightning_flatness.measure.compared import are_paired, covariances_of, errors_of, row_of
from lightning_flatness.measure.correlations import correlations_of
from lightning_flatness.measure.side_by_side import measured_together, with_forward_numbers
from lightning_flatness.results import Comparison, FlatnessReport

Models = Mapping[str, FlatnessReport | nn.Module] | Sequence[FlatnessReport | nn.Module]


def compare(
    models: Models,
    batches: Iterable[Any] | None = None,
    *,
    data: str = "",
    train_batches: Iterable[Any] | None = None,
    train_losses: Mapping[str, FlatnessReport | float] | Sequence[FlatnessReport | float] | None = None,
    outcome: Mapping[str, float] | Sequence[float] | None = None,
    outcome_name: str = "outcome",
    hyperparameters: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | None = None,
    same_samples: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Comparison:
    """Compare models, or reports of models, by the flatness of the same layers.

    The result has a row for every model, the differences to the first model with standard errors, and cautions, which
    say what must not be concluded. Models are measured together on the same samples. A sample that is hard for one
    model is often hard for the others. So a part of the sampling error cancels in a difference. The standard errors
    take this into account for models that are measured here, and for reports that were measured with
    ``per_sample=True`` on the same samples in the same order.

    Arguments with one entry for each model are mappings with the same names as ``models``, or sequences in the order of
    ``models``.

    Args:
        models: models, or reports of :func:`~lightning_flatness.measure_flatness`, as a mapping from names or as a
            sequence. The first model is the reference. The models of a sequence get the names 1, 2, ...
        batches: data to measure the models on, in the same formats as for
            :func:`~lightning_flatness.measure_flatness`. They are read once for all models. Their first batch is read
            once more for each model with BatchNorm, unless they are an iterator.
        data: description of ``batches``, and of the data of reports that have none: ``"train"``, ``"val"`` or a text.
        train_batches: training data, to measure the training loss of the models; not needed with ``data="train"``.
        train_losses: training losses that are known already, as numbers or as reports on training data.
        outcome: for each model, a number that flatness is expected to predict, such as a generalization gap or a test
            loss; larger is worse. The result then also has baselines, and the rank correlations of measures and
            baselines with the outcome. Baselines need no Hessian, but one more pass over ``batches``.
        outcome_name: name of the outcome in tables.
        hyperparameters: hyper-parameters of each model. With them and ``outcome``, the result also has granulated τ,
            which is the mean rank correlation among models that differ in one hyper-parameter only.
        same_samples: whether reports with ``per_sample=True`` are known to be of the same samples in the same order. By
            default, this is checked: a sample that two models both classify correctly must have the same class in both
            reports. If the check fails, the errors of different models count as independent.
        progress: show a progress bar; by default only in a terminal.
        **options: options of :func:`~lightning_flatness.measure_flatness` for the models, such as ``layers=``.

    Returns:
        A :class:`~lightning_flatness.Comparison`.

    Raises:
        FlatnessError: there are fewer than two models, models were given without ``batches``, or an argument has other
            names than ``models``. Errors of :func:`~lightning_flatness.measure_flatness` name the model.

    Source:
        Jiang et al. 2020 (arXiv 1912.02178), granulated τ; Efron 1982, the jackknife.

    Example:
        >>> import torch
        >>> nets = {name: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for name in ("sgd", "sam")}
        >>> batch = torch.randn(64, 4), torch.arange(64) % 3
        >>> comparison = compare(nets, [batch], layers="0", data="train")
        >>> comparison.is_paired, comparison.difference("relative_flatness", "sam").is_known
        (True, True)
    """
    given = _named(models)
    networks = {name: model for name, model in given.items() if isinstance(model, nn.Module)}
    _check(networks, batches, train_batches, options, outcome is not None)
    outcomes = _by_name("outcome", outcome, given)
    losses = {name: _loss_of(name, loss) for name, loss in _by_name("train_losses", train_losses, given).items()}

    measured = {} if batches is None else measured_together(networks, batches, data, progress, options)
    reports = {
        name: model if model.data else replace(model, data=data)
        for name, model in (given | measured).items()
        if isinstance(model, FlatnessReport)
    }
    is_paired = are_paired(list(reports.values()), together=same_samples or len(measured) == len(given))
    covariances = covariances_of(list(reports.values()), is_paired)
    rows = {}
    for index, (name, report) in enumerate(reports.items()):
        row = row_of(name, report, errors_of(covariances, index), losses.get(name), outcomes.get(name))
        if name in networks:
            of_baselines = batches if outcomes else None
            row = with_forward_numbers(row, networks[name], of_baselines, train_batches, options)
        rows[name] = row
    return Comparison(
        rows,
        cautions_of(rows, networks, batches),
        covariances,
        is_paired,
        correlations_of(rows, _by_name("hyperparameters", hyperparameters, given)) if outcomes else (),
        outcome_name if outcomes else "",
    )


def _check(networks: Mapping[str, nn.Module], batches: Any, train_batches: Any, options: Any, is_reread: bool) -> None:
    """Raise an error if the arguments of :func:`compare` do not fit together.

    Models need ``batches``. If only reports are given, ``batches``, ``train_batches`` and ``options`` must not be
    given. ``options`` must not have ``sync``. Data that are read several times must not be an iterator. ``is_reread``
    says whether ``batches`` will be read twice.
    """
    if networks and batches is None:
        raise FlatnessError(f"Model '{next(iter(networks))}' has no data to be measured on: give batches=.")
    unused = [*["batches"] * (batches is not None), *["train_batches"] * (train_batches is not None), *options]
    if unused and not networks:
        raise FlatnessError(f"{unused[0]}= is for models to measure, but only reports were given. Leave it out.")
    if options.get("sync"):
        raise FlatnessError(
            "compare() runs in one process, so it does not take sync=True. Make reports with measure_flatness(..., "
            "sync=True) on all ranks, and compare these reports."
        )
    if is_reread:
        check_rereadable(batches, "outcome= needs a second pass")
    if len(networks) > 1:
        check_rereadable(train_batches, "every model needs a pass over it", "train_batches")


def _loss_of(name: str, loss: FlatnessReport | float) -> float:
    """Return the training loss of model ``name``, which the user gave as a number or as a report."""
    value = loss.loss if isinstance(loss, FlatnessReport) else as_number(loss)
    if value is None:
        raise FlatnessError(
            f"train_losses= of model '{name}' is {loss!r}; give a number, or a FlatnessReport of the training data."
        )
    return value


def _by_name(argument: str, values: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping from names of models to ``values``. If ``values`` is None, return an empty mapping.

    ``values`` is a mapping or a sequence with one value for each model. Error messages call it ``argument``.
    """
    if values is None:
        return {}
    if isinstance(values, Mapping):
        values = {str(name): value for name, value in values.items()}
        wrong = sorted(values.keys() ^ models.keys())
        if wrong:
            raise FlatnessError(f"{argument}= must have the names of models=, but '{wrong[0]}' is in only one of them.")
        return {name: values[name] for name in models}
    if len(values) != len(models):
        raise FlatnessError(f"{argument}= has {len(values)} entries for {len(models)} models; give one for each.")
    return dict(zip(models, values, strict=True))


def _named(models: Models) -> dict[str, FlatnessReport | nn.Module]:
    """Return a mapping from names to models. The models of a sequence get the names 1, 2, ..."""
    if isinstance(models, (FlatnessReport, nn.Module)) or not isinstance(models, (Mapping, Sequence)):
        raise FlatnessError(f"models is a {type(models).__name__}; give a mapping or a list of models or reports.")
    pairs = models.items() if isinstance(models, Mapping) else enumerate(models, start=1)
    named = {str(name): model for name, model in pairs}
    if len(named) < 2:
        raise FlatnessError(f"A comparison takes two models or more; {len(named)} was given.")
    for name, model in named.items():
        if not isinstance(model, (FlatnessReport, nn.Module)):
            raise FlatnessError(
                f"Model '{name}' is a {type(model).__name__}; give models, or reports of measure_flatness."
            )
    return named
